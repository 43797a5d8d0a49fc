"""Turns rows into the micro-batches of one rank. Which rows a step uses is a pure function of (seed, step).

In: rows, a step and a rank. Out: for each share of the step's rows, the micro-batches of this rank. A share is divided
among the ranks, and every rank runs the same number of forward passes of the same shape, some with padding rows, which
have no targets. Nothing is on disk, because the step number is the only cursor.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from sorted_ds.base.errors import UserError
from sorted_ds.data.mixture import Order, Shuffled

NO_TARGET = -100
"""The label of a position without a target. The losses of torch and of this package ignore it."""

Batch = dict[str, Tensor]
"""The tensors of a forward pass by the names that the task gives them: for text `input_ids` and `labels`."""


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward pass on one rank."""

    inputs: Batch
    """The first dimension of each tensor counts the rows."""
    num_targets: int
    num_rows: int
    """The number of rows that are not padding."""


class Rows(Protocol):
    """The training or validation rows of the data, by their number."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Any: ...


Collate = Callable[[Sequence[Any], int], MicroBatch]
"""Makes a micro-batch of the given size from at most as many rows; the others are padding rows without targets."""


@dataclass(frozen=True)
class Dealt:
    """How the rows of one share are divided among the ranks."""

    rows_per_share: int
    forwards: int
    """Forward passes on each rank for one share."""
    rows_per_forward: int
    padded_fraction: float
    """The fraction of the rows in the forward passes of all ranks that are padding."""


def deal(step_rows: int, num_shares: int, micro_batch_rows: int, world_size: int) -> Dealt:
    """Divides the rows of a share among the ranks, for the fewest forward passes of at most `micro_batch_rows` rows.

    With this number of forward passes, it takes the smallest number of rows for each. Raises: UserError when the
    step's rows cannot be cut into equal shares.
    """
    if step_rows % num_shares:
        below = step_rows - step_rows % num_shares
        nearest = ", ".join(str(rows) for rows in (below, below + num_shares) if rows)
        raise UserError(
            f"batch.step_rows = {step_rows} cannot be cut into {num_shares} equal shares "
            f"(sampling.subnets_per_step / sampling.subnets_per_share). Nearest that can: {nearest}."
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
    """The training rows of one rank. Which rows a step uses does not depend on the number of its shares."""

    def __init__(
        self,
        rows: Rows,
        collate: Collate,
        seed: int,
        step_rows: int,
        micro_batch_rows: int,
        rank: int,
        world_size: int,
        order: Order | None = None,
    ):
        """`order`: which row is where; None for that of a single source."""
        self.rows, self.collate = rows, collate
        self.order = order or Shuffled(len(rows), seed)
        self.step_rows, self.micro_batch_rows = step_rows, micro_batch_rows
        self.rank = rank
        self.world_size = world_size

    def dealt(self, num_shares: int) -> Dealt:
        """Returns how the rows of a share are divided. Raises: UserError when there are no equal shares."""
        return deal(self.step_rows, num_shares, self.micro_batch_rows, self.world_size)

    def batches(self, step: int, num_shares: int) -> list[list[MicroBatch]]:
        """Returns this rank's micro-batches, for each share of the step's rows.

        Every rank gets the same number of micro-batches, and all have the same shape.
        """
        dealt = self.dealt(num_shares)
        size = dealt.rows_per_share
        starts = (step * self.step_rows + share * size for share in range(num_shares))
        return [list(self._share(range(start, start + size), dealt)) for start in starts]

    def _share(self, positions: range, dealt: Dealt) -> Iterator[MicroBatch]:
        mine = [self.order.row_at(position) for position in positions[self.rank :: self.world_size]]
        return _micro_batches(self.rows, self.collate, mine, dealt)


def validation_batches(
    rows: Rows, collate: Collate, num_rows: int, micro_batch_rows: int, rank: int, world_size: int
) -> Iterator[MicroBatch]:
    """Yields this rank's part of `num_rows` rows, or of all if there are fewer, evenly spread over the whole data.

    Every rank gets the same number of micro-batches, because their forward passes issue collectives.
    """
    num_rows = min(num_rows, len(rows))
    mine = [number * len(rows) // num_rows for number in range(rank, num_rows, world_size)]
    return _micro_batches(rows, collate, mine, deal(num_rows, 1, micro_batch_rows, world_size))


def _micro_batches(rows: Rows, collate: Collate, mine: Sequence[int], dealt: Dealt) -> Iterator[MicroBatch]:
    size = dealt.rows_per_forward
    for forward in range(dealt.forwards):
        yield collate([rows[row] for row in mine[forward * size : (forward + 1) * size]], size)
