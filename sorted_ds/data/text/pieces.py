"""A row as a person reads it: pieces of text, each either learned or not, and where documents begin.

In: a row and its tokenizer. Out: pieces in order, which hold all tokens of the row. Nothing is on disk.
"""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from sorted_ds.data.rows import Row

CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
"""Control characters of a text would command the terminal, so their pictures are shown."""


@dataclass(frozen=True)
class Piece:
    """Tokens of one document that follow each other, and that are all learned or all not."""

    text: str
    is_target: bool
    """Whether the tokens are learned. The first token of a row never is, because nothing predicts it."""
    begins: bool
    """Whether the piece is the beginning of its document."""
    ids: list[int]


def pieces_of(row: Row, tokenizer: PreTrainedTokenizerFast) -> list[Piece]:
    """Returns the pieces of a row. A character whose bytes lie in two pieces is shown as a replacement character."""
    is_target = row.is_target.copy()
    is_target[0] = False
    borders = np.flatnonzero(row.begins[1:] | (is_target[1:] != is_target[:-1])) + 1
    starts = [0, *borders.tolist()]
    return [
        Piece(_text(ids, tokenizer), bool(is_target[start]), bool(row.begins[start]), ids)
        for start, stop in zip(starts, [*starts[1:], len(row.ids)], strict=True)
        for ids in [row.ids[start:stop].tolist()]
    ]


def _text(ids: list[int], tokenizer: PreTrainedTokenizerFast) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text).translate(CONTROL_PICTURES)
