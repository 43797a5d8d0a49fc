"""Tokens to packed rows: the text cut every `row_tokens`, across documents, nothing padded and nothing twice.

In: token ids, mapped from disk. Out: row i as an array. Nothing about rows is on disk.
"""

import numpy as np

from sorted_ds.base.errors import UserError


class PackedRows:
    """`rows[i]`: the ids of row i and the first of the next one, so that each of its positions has a target.

    Shapes: int64 [row_tokens + 1].
    """

    def __init__(self, tokens: np.ndarray, row_tokens: int, side: str = "training"):
        """`side` of the text, for the message. Raises: UserError when the tokens do not fill one row."""
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
