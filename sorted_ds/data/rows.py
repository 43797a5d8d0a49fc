"""Packed rows: the token ids of all documents, cut every `row_tokens`, without padding and without repetition.

In: token ids, mapped from disk. Out: row i as an array. Nothing about rows is on disk.
"""

import numpy as np

from sorted_ds.base.errors import UserError


class PackedRows:
    """`rows[i]` returns the ids of row i and the first id of row i + 1, so that each position of row i has a target.

    Shapes: int64 [row_tokens + 1].
    """

    def __init__(self, tokens: np.ndarray, row_tokens: int, side: str = "training"):
        """Cuts the tokens of one `side` of the text, which errors name.

        Raises: UserError when the tokens do not fill one row.
        """
        self.tokens = tokens
        self.row_tokens = row_tokens
        if len(self) < 1:
            raise UserError(
                f"batch.row_tokens = {row_tokens} is too long: the {side} text has {len(tokens)} tokens, and one row "
                f"needs {row_tokens + 1}. Use more text, {'a larger data.validation_fraction, ' * (side != 'training')}"
                "or shorter rows."
            )

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.row_tokens

    def __getitem__(self, row: int) -> np.ndarray:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        start = row * self.row_tokens
        return self.tokens[start : start + self.row_tokens + 1].astype(np.int64)
