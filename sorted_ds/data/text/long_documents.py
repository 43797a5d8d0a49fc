"""Long documents in parts: cuts a document into overlapping texts, and joins the tokens of these texts again.

In: a document that is too long for one worker, and then the tokens of each part in order. Out: the tokens of the
document, as soon as they are decided. Nothing is on disk. A worker imports this module, which imports neither
transformers nor torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

OVERLAP_CHARACTERS = 2**11
"""How far the text of a part reaches into each of its neighbours. A tokenizer's choice depends on less text, except in
a longer word."""
AGREEING_TOKENS = 8
"""Two parts are joined where they have this number of equal tokens before and after."""


@dataclass(frozen=True)
class Span:
    """The characters of a document for which a part stands. They are in the text of this part and of a neighbour."""

    start: int
    stop: int
    is_last: bool
    is_validation: bool

    @property
    def num_characters(self) -> int:
        """Returns the number of characters, without the overlap."""
        return self.stop - self.start


@dataclass(frozen=True)
class Part:
    """What a worker gets of a long document."""

    span: Span
    text: str
    """The text of the span, and the overlap on both sides."""
    text_start: int
    """Where `text` starts in the document, in characters."""


@dataclass(frozen=True, eq=False)
class PartTokens:
    """The tokens of a part's text."""

    span: Span
    ids: np.ndarray
    """Shape [tokens]."""
    starts: np.ndarray
    """Where each token starts in the document, in characters, in ascending order. Shape: int64 [tokens]."""

    def after(self, number: int) -> "PartTokens":
        """Returns the tokens from `number` on."""
        return PartTokens(self.span, self.ids[number:], self.starts[number:])


def cut(document: str, is_validation: bool, size: int) -> Iterator[Part]:
    """Yields the parts of a document in order. Each but the last stands for `size` characters."""
    overlap = min(OVERLAP_CHARACTERS, size // 4)
    for start in range(0, len(document), size):
        stop = min(start + size, len(document))
        text_start = max(0, start - overlap)
        span = Span(start, stop, stop == len(document), is_validation)
        yield Part(span, document[text_start : stop + overlap], text_start)


class Joiner:
    """Joins the parts of one document after the other. It keeps the tokens of one part."""

    def __init__(self) -> None:
        self._left: PartTokens | None = None

    def add(self, right: PartTokens) -> np.ndarray:
        """Returns the ids that are decided now: those up to the joint with this part, and all after the last part.

        The parts of a document are added in order. Two parts are joined at a token that both start at the same
        character, with the same tokens around it. Far from the ends of its text a part has the tokens of the whole
        document, because a token depends on few characters around it. So the joined tokens are those of the whole.

        Two parts may nowhere agree, where one unknown word or one run of equal characters is longer than the overlap.
        There the tokens may differ from those of the whole document. The parts are then joined at a character where
        both have a token start. If there is none, the tokens that start before the second span are those of the first
        part, and the others those of the second: a token's text may be missing or double at that place.
        """
        decided = right.ids[:0]
        if self._left is not None:
            own, other = _joint(self._left, right) or _hard_cut(self._left, right)
            decided, right = self._left.ids[:own], right.after(other)
        self._left = None if right.span.is_last else right
        return np.concatenate([decided, right.ids]) if right.span.is_last else decided


def _joint(left: PartTokens, right: PartTokens) -> tuple[int, int] | None:
    """Returns the numbers of a token that starts at the same character in both parts.

    It is the one nearest to their border with equal tokens around it, or the nearest of all if the parts nowhere agree.
    """
    if not len(left.starts) or not len(right.starts):
        return None
    first = int(np.searchsorted(left.starts, right.starts[0]))
    last = int(np.searchsorted(right.starts, left.starts[-1], side="right"))
    # Where several tokens start at one character, np.intersect1d gives the number of the first.
    common, own, other = np.intersect1d(left.starts[first:], right.starts[:last], return_indices=True)
    nearest_first = np.argsort(np.abs(common - right.span.start), kind="stable")
    pairs = [(first + int(own[k]), int(other[k])) for k in nearest_first]
    return next((pair for pair in pairs if _agree(left.ids, right.ids, *pair)), pairs[0] if pairs else None)


def _agree(left: np.ndarray, right: np.ndarray, own: int, other: int) -> bool:
    """Returns whether the same tokens stand around token `own` of `left` and token `other` of `right`."""
    if min(own, other, len(left) - own, len(right) - other) < AGREEING_TOKENS:
        return False
    reach = AGREEING_TOKENS
    return np.array_equal(left[own - reach : own + reach], right[other - reach : other + reach])


def _hard_cut(left: PartTokens, right: PartTokens) -> tuple[int, int]:
    border = right.span.start
    return int(np.searchsorted(left.starts, border)), int(np.searchsorted(right.starts, border))
