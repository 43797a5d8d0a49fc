"""The split of documents into training and validation, by a hash of their content.

In: the documents, once. Out: a `Split`, which says for any document on which side it is. The hash is keyed with the
seed, so equal documents are on the same side, and neither order nor file names matter. Nothing is on disk.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

from sorted_ds.base.errors import UserError

NUM_POSITIONS = 2**64
"""The hash of a document gives it one of this number of positions."""


@dataclass(frozen=True)
class Split:
    """Documents whose hash position is below `threshold` are for validation, the others for training."""

    seed: int
    threshold: int
    num_characters: int
    """Number of characters of all documents."""

    def is_validation(self, document: str) -> bool:
        """Returns whether the document is for validation."""
        return hash_position(document, self.seed) < self.threshold


def hash_position(document: str, seed: int) -> int:
    """Returns a position in [0, NUM_POSITIONS) that depends on content and seed alone, and looks random."""
    digest = blake2b(document.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "little")


def split_documents(documents: Iterable[str], validation_fraction: float, seed: int) -> Split:
    """Returns a split with about `validation_fraction` of the documents for validation, and at least one on each side.

    Raises: UserError when there are not two different documents.
    """
    lowest, highest, num_characters = NUM_POSITIONS, -1, 0
    for document in documents:
        position = hash_position(document, seed)
        lowest, highest = min(lowest, position), max(highest, position)
        num_characters += len(document)
    if not num_characters:
        raise UserError("data: all of the text is empty or whitespace. Name other files in data.text or data.files.")
    if lowest == highest:
        raise UserError(
            "data: there is only one document, and validation takes whole documents. Use several files, or JSONL with "
            "a document on each line."
        )
    threshold = min(max(round(validation_fraction * NUM_POSITIONS), lowest + 1), highest)
    return Split(seed, threshold, num_characters)
