"""Packed rows: the token ids of all documents, cut every `row_tokens`, without padding and without repetition.

In: token ids, mapped from disk, and for conversations a mark for each token. Out: row i as a `Row`. Nothing about rows
is on disk.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sorted_ds.base.errors import UserError

TARGET, BEGINS = 1, 2
"""The bits of a mark: the token is learned, and it is the first one of its document."""
ROWS_AT_A_TIME = 2**12
"""So many rows are searched for targets at once."""
MARKS_AT_A_TIME = 2**24


@dataclass(frozen=True, eq=False)
class Row:
    """The ids of a row and the first id of the next one, so that each position can have a target.

    Shapes: [row_tokens + 1], but `positions` has [row_tokens].
    """

    ids: np.ndarray
    is_target: np.ndarray
    """Whether the token is learned where it is predicted. The first one is not predicted."""
    begins: np.ndarray
    """Whether the token is the first one of its document."""
    positions: np.ndarray | None = None
    """The position of each token in its document, from the beginning of the row on; None if documents are not isolated.
    """


class PackedRows:
    """`rows[i]` returns row i. Rows without a target are left out."""

    def __init__(
        self,
        tokens: np.ndarray,
        row_tokens: int,
        side: str = "training",
        marks: np.ndarray | None = None,
        eos_id: int | None = None,
        isolate: bool = False,
    ):
        """Cuts the tokens of one `side` of the text, which errors name.

        `marks`: None if every token is learned; then `eos_id` ends a document. `isolate`: whether each document has
        positions of its own. Raises: UserError when the tokens do not fill one row, or no row has a target.
        """
        self.tokens, self.marks = tokens, marks
        self.row_tokens = row_tokens
        self.eos_id, self.isolate = eos_id, isolate
        self.num_cut = max(0, (len(tokens) - 1) // row_tokens)
        """The number of rows, with those without a target."""
        if self.num_cut < 1:
            raise UserError(
                f"batch.row_tokens = {row_tokens} is too long: the {side} text has {len(tokens)} tokens, and one row "
                f"needs {row_tokens + 1}. Use more text, {'a larger data.validation_fraction, ' * (side != 'training')}"
                "or shorter rows."
            )
        self._numbers = None if marks is None else np.concatenate(list(self._with_targets(marks)))
        if not len(self):
            raise UserError(f"none of the {self.num_cut} {side} rows has an answer. Use more text, or longer rows.")

    def __len__(self) -> int:
        return self.num_cut if self._numbers is None else len(self._numbers)

    def __getitem__(self, row: int) -> Row:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        start = (row if self._numbers is None else int(self._numbers[row])) * self.row_tokens
        ids = self.tokens[start : start + self.row_tokens + 1].astype(np.int64)
        begins = self._begins(start)
        is_target = np.ones(len(ids), bool) if self.marks is None else self._has(TARGET, start)
        if not self.isolate:
            return Row(ids, is_target, begins)
        return Row(ids, is_target & ~begins, begins, positions_of(begins[:-1]))

    def _begins(self, start: int) -> np.ndarray:
        if self.marks is not None:
            return self._has(BEGINS, start)
        before = self.tokens[max(0, start - 1) : start + self.row_tokens] == self.eos_id
        return before if start else np.concatenate([[True], before])

    def _has(self, bit: int, start: int) -> np.ndarray:
        assert self.marks is not None
        return self.marks[start : start + self.row_tokens + 1] & bit > 0

    def _with_targets(self, marks: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the numbers of the rows that have a target."""
        for first in range(0, self.num_cut, ROWS_AT_A_TIME):
            last = min(first + ROWS_AT_A_TIME, self.num_cut)
            part = marks[first * self.row_tokens + 1 : last * self.row_tokens + 1]
            learned = part & (TARGET | BEGINS) == TARGET if self.isolate else part & TARGET > 0
            yield first + np.flatnonzero(learned.reshape(-1, self.row_tokens).any(1))


@dataclass(frozen=True)
class Cut:
    """What became of documents in rows."""

    documents: int
    longer: int
    """Documents that are longer than a row."""
    cut: int
    """Documents that a border of two rows cuts, with the longer ones."""
    rows: int
    without_target: int
    """Rows without a target, which are left out."""


def cut_of(rows: PackedRows) -> Cut:
    """Counts what became of conversations in rows."""
    marks, size = rows.marks, rows.row_tokens
    assert marks is not None
    parts = range(0, len(marks), MARKS_AT_A_TIME)
    found = [start + np.flatnonzero(marks[start : start + MARKS_AT_A_TIME] & BEGINS) for start in parts]
    starts = np.concatenate(found)
    last = np.append(starts[1:], len(marks)) - 1
    return Cut(
        documents=len(starts),
        longer=int((last - starts >= size).sum()),
        cut=int((starts // size < last // size).sum()),
        rows=len(rows),
        without_target=rows.num_cut - len(rows),
    )


def positions_of(begins: np.ndarray) -> np.ndarray:
    """Returns positions that start again at 0 at each beginning. Shapes: bool [n] -> int64 [n]."""
    index = np.arange(len(begins))
    return index - np.maximum.accumulate(np.where(begins, index, 0))
