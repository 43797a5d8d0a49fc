"""Training and validation documents, told apart by their content.

In: the documents, once. Out: a `Split`, which says of any document on which side it is: by a hash keyed with the seed,
so equal documents are on the same side, and neither order nor file names matter. Nothing about it is on disk.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

from sorted_ds.base.errors import UserError

PLACES = 2**64
"""A document's place is in [0, PLACES)."""


@dataclass(frozen=True)
class Split:
    """Documents whose place is below `threshold` are for validation, the others for training."""

    seed: int
    threshold: int
    num_characters: int
    """Of all documents."""

    def is_validation(self, document: str) -> bool:
        return place_of(document, self.seed) < self.threshold


def place_of(document: str, seed: int) -> int:
    """A number in [0, PLACES) that looks random and follows from content and seed."""
    digest = blake2b(document.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "little")


def split_documents(documents: Iterable[str], validation_fraction: float, seed: int) -> Split:
    """The split with about that share of the documents for validation, and at least one document on each side.

    Raises: UserError when there are not two different documents.
    """
    lowest, highest, num_characters = PLACES, -1, 0
    for document in documents:
        place = place_of(document, seed)
        lowest, highest = min(lowest, place), max(highest, place)
        num_characters += len(document)
    if not num_characters:
        raise UserError("data: all of the text is empty or whitespace. Name other files in data.text or data.jsonl.")
    if lowest == highest:
        raise UserError(
            "data: there is one document only, and validation is split off by whole documents. Use several files, or "
            "JSONL with a document on each line."
        )
    threshold = min(max(round(validation_fraction * PLACES), lowest + 1), highest)
    return Split(seed, threshold, num_characters)
