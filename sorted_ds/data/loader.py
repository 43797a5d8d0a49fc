"""Rows to this rank's micro-batches; which rows is a pure function of (seed, step).

In: rows, a step, a rank. Out: for each share of the step's rows the micro-batches of this rank. A share is dealt over
the ranks: every rank runs the same number of forwards of the same shape, short ones filled up by rows without targets.
Nothing is on disk, and nothing needs saving: the step is the only cursor.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from sorted_ds.base.errors import UserError
from sorted_ds.base.shuffle import Shuffle

NO_TARGET = -100
"""The label that torch's losses leave out, and ours."""

Batch = dict[str, Tensor]
"""What a forward pass gets, by the names that its task gives: for text `input_ids` and `labels`."""


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward pass of one rank."""

    inputs: Batch
    """Each tensor's first dimension is the rows."""
    num_targets: int
    num_rows: int
    """How many of the rows are real; the rest fill up and have no targets."""


class Rows(Protocol):
    """The rows of one side of the data, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Any: ...


Collate = Callable[[Sequence[Any], int], MicroBatch]
"""Makes a micro-batch of rows, filled up to a number of rows by some without targets."""


@dataclass(frozen=True)
class Dealt:
    """How the rows of one share are dealt over the ranks."""

    rows_per_share: int
    forwards: int
    """Forward passes of each rank over one share."""
    rows_per_forward: int
    padded_fraction: float
    """The part of the rows that run, on all ranks, that have no targets."""


def deal(step_rows: int, num_shares: int, micro_batch_rows: int, world_size: int) -> Dealt:
    """The fewest forwards of at most `micro_batch_rows`, and the smallest shape that so many need.

    Raises: UserError when the shares cannot have equally many rows.
    """
    if step_rows % num_shares:
        below = step_rows - step_rows % num_shares
        nearest = ", ".join(str(rows) for rows in (below, below + num_shares) if rows)
        raise UserError(
            f"batch.step_rows = {step_rows} cannot be divided by sampling.subnets_per_step = {num_shares}. "
            f"Nearest that can: {nearest}."
        )
    rows_per_share = step_rows // num_shares
    most_per_rank = _divide_up(rows_per_share, world_size)
    forwards = _divide_up(most_per_rank, micro_batch_rows)
    rows_per_forward = _divide_up(most_per_rank, forwards)
    padded_fraction = 1 - rows_per_share / (world_size * forwards * rows_per_forward)
    return Dealt(rows_per_share, forwards, rows_per_forward, padded_fraction)


def _divide_up(number: int, parts: int) -> int:
    return -(-number // parts)


class Loader:
    """The training rows of one rank. Each row comes once an epoch, in another order each epoch."""

    def __init__(
        self,
        rows: Rows,
        collate: Collate,
        seed: int,
        step_rows: int,
        num_shares: int,
        micro_batch_rows: int,
        rank: int,
        world_size: int,
    ):
        """Raises: UserError when the shares cannot have equally many rows."""
        self.rows, self.collate = rows, collate
        self.seed = seed
        self.num_shares = num_shares
        self.rank = rank
        self.world_size = world_size
        self.dealt = deal(step_rows, num_shares, micro_batch_rows, world_size)

    def batches(self, step: int) -> list[list[MicroBatch]]:
        """For each share of the step's rows, this rank's micro-batches: as many, of the same shape, on every rank."""
        size = self.dealt.rows_per_share
        starts = ((step * self.num_shares + share) * size for share in range(self.num_shares))
        return [list(self._share(range(start, start + size))) for start in starts]

    def _share(self, positions: range) -> Iterator[MicroBatch]:
        mine = [self.row_at(position) for position in positions[self.rank :: self.world_size]]
        return _micro_batches(self.rows, self.collate, mine, self.dealt)

    def row_at(self, position: int) -> int:
        """The row at a position of the whole training, counted over all steps and shares."""
        epoch, place = divmod(position, len(self.rows))
        return Shuffle(len(self.rows), (self.seed, "rows", epoch))(place)


def validation_batches(
    rows: Rows, collate: Collate, num_rows: int, micro_batch_rows: int, rank: int, world_size: int
) -> Iterator[MicroBatch]:
    """This rank's share of `num_rows` rows (at most all) at equal distances over the whole data.

    Every rank gets as many micro-batches of the same shape, because collectives run in them.
    """
    num_rows = min(num_rows, len(rows))
    mine = [number * len(rows) // num_rows for number in range(rank, num_rows, world_size)]
    return _micro_batches(rows, collate, mine, deal(num_rows, 1, micro_batch_rows, world_size))


def _micro_batches(rows: Rows, collate: Collate, mine: Sequence[int], dealt: Dealt) -> Iterator[MicroBatch]:
    size = dealt.rows_per_forward
    for forward in range(dealt.forwards):
        yield collate([rows[row] for row in mine[forward * size : (forward + 1) * size]], size)
