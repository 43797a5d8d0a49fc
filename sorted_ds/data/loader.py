"""Packed rows to this rank's micro-batches; which rows is a pure function of (seed, step).

In: `PackedRows`, a step, a rank. Out: for each sample of the step the micro-batches of this rank. A sample's rows are dealt
over the ranks: every rank runs the same number of forwards of the same shape, short ones filled up by rows without
targets. Nothing is on disk, and nothing needs saving: the step is the only cursor.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sorted_ds.base.errors import UserError
from sorted_ds.base.shuffle import Shuffle
from sorted_ds.data.rows import PackedRows

NO_TARGET = -100
"""The label that torch's losses leave out, and ours."""


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward pass of one rank."""

    input_ids: Tensor
    """int64 [rows, row_tokens]."""
    labels: Tensor
    """int64 [rows, row_tokens]: the next token of each position, -100 where there is no target."""
    num_targets: int
    num_rows: int
    """Without those that fill up."""


@dataclass(frozen=True)
class Dealt:
    """How the rows of one sample are shared out over the ranks."""

    rows_per_sample: int
    forwards: int
    """Of each rank for one sample."""
    rows_per_forward: int
    padded_fraction: float
    """Rows without targets among those that run, on all ranks."""


def deal(step_rows: int, samples: int, micro_batch_rows: int, world_size: int) -> Dealt:
    """The fewest forwards of at most `micro_batch_rows`, and the smallest shape that so many need.

    Raises: UserError when the samples cannot have equally many rows.
    """
    if step_rows % samples:
        below = step_rows - step_rows % samples
        nearest = ", ".join(str(rows) for rows in (below, below + samples) if rows)
        raise UserError(
            f"batch.step_rows = {step_rows} cannot be shared out over sampling.subnets_per_step = {samples}. "
            f"Nearest that can: {nearest}."
        )
    rows_per_sample = step_rows // samples
    most_per_rank = _divide_up(rows_per_sample, world_size)
    forwards = _divide_up(most_per_rank, micro_batch_rows)
    rows_per_forward = _divide_up(most_per_rank, forwards)
    padded_fraction = 1 - rows_per_sample / (world_size * forwards * rows_per_forward)
    return Dealt(rows_per_sample, forwards, rows_per_forward, padded_fraction)


def _divide_up(number: int, parts: int) -> int:
    return -(-number // parts)


class Loader:
    """The training rows of one rank. Each row comes once an epoch, in another order each epoch."""

    def __init__(
        self,
        rows: PackedRows,
        seed: int,
        step_rows: int,
        samples: int,
        micro_batch_rows: int,
        rank: int,
        world_size: int,
    ):
        """Raises: UserError when the samples cannot have equally many rows."""
        self.rows = rows
        self.seed = seed
        self.samples = samples
        self.rank = rank
        self.world_size = world_size
        self.dealt = deal(step_rows, samples, micro_batch_rows, world_size)

    def batches(self, step: int) -> list[list[MicroBatch]]:
        """For each sample of the step, this rank's micro-batches: as many, and of the same shape, on every rank."""
        per_sample = self.dealt.rows_per_sample
        starts = ((step * self.samples + sample) * per_sample for sample in range(self.samples))
        return [list(self._sample(range(start, start + per_sample))) for start in starts]

    def _sample(self, positions: range) -> Iterator[MicroBatch]:
        mine = [self.row_at(position) for position in positions[self.rank :: self.world_size]]
        return _micro_batches(self.rows, mine, self.dealt)

    def row_at(self, position: int) -> int:
        """The row at a position of the whole training, counted over all steps and samples."""
        epoch, place = divmod(position, len(self.rows))
        return Shuffle(len(self.rows), (self.seed, "rows", epoch))(place)


def validation_batches(
    rows: PackedRows, num_rows: int, micro_batch_rows: int, rank: int, world_size: int
) -> Iterator[MicroBatch]:
    """This rank's share of `num_rows` rows (at most all) at equal distances over the whole text.

    Every rank gets as many micro-batches of the same shape: collectives run in them.
    """
    num_rows = min(num_rows, len(rows))
    mine = [number * len(rows) // num_rows for number in range(rank, num_rows, world_size)]
    return _micro_batches(rows, mine, deal(num_rows, 1, micro_batch_rows, world_size))


def _micro_batches(rows: PackedRows, mine: Sequence[int], dealt: Dealt) -> Iterator[MicroBatch]:
    size = dealt.rows_per_forward
    for forward in range(dealt.forwards):
        yield _micro_batch([rows[row] for row in mine[forward * size : (forward + 1) * size]], size, rows.row_tokens)


def _micro_batch(rows: Sequence[np.ndarray], size: int, row_tokens: int) -> MicroBatch:
    input_ids = torch.zeros(size, row_tokens, dtype=torch.int64)
    labels = torch.full((size, row_tokens), NO_TARGET)
    for number, ids in enumerate(rows):
        row = torch.from_numpy(ids)
        input_ids[number], labels[number] = row[:-1], row[1:]
    return MicroBatch(input_ids, labels, num_targets=len(rows) * row_tokens, num_rows=len(rows))
