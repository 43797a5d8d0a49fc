"""`Document`: what becomes a sequence of tokens, and which part of it is learned.

In: a text file, or a record of a file. Out: a text, and the characters of its answers. Nothing is on disk. The workers
import this module, which imports neither transformers nor torch.
"""

from dataclasses import dataclass

Span = tuple[int, int]
"""The first character, and the one after the last."""


@dataclass(frozen=True)
class Document:
    """A text, or a conversation as the tokenizer's chat template writes it."""

    text: str
    answers: tuple[Span, ...] | None = None
    """The spans of a conversation that are learned, in order; None if the whole text is."""
