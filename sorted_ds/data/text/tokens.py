"""Prepared tokens on disk: opened, checked and described.

    FOLDER/tokenizer/       an ordinary Hugging Face tokenizer
    FOLDER/train.bin        token ids, flat, little-endian; the end-of-text token follows each document,
                            and the beginning-of-text token leads it if `begins_with_bos`
    FOLDER/validation.bin
    FOLDER/train_marks.bin, validation_marks.bin    only for conversations: a byte for each token (rows.py)
    FOLDER/meta.json        type, vocabulary and number of the token ids

In: a folder. Out: `TokenizedText`, its tokens mapped from disk after a check of their number.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sorted_ds.base.errors import UserError
from sorted_ds.data.rows import TARGET, Cut
from sorted_ds.data.text.content_key import FORMAT
from sorted_ds.data.text.encode import (
    TRAIN_FILE,
    TRAIN_MARKS,
    VALIDATION_FILE,
    VALIDATION_MARKS,
    Encoding,
)
from sorted_ds.data.text.tokenizer import Vocabulary

META_FILE = "meta.json"
TOKENIZER_DIR = "tokenizer"
MARK = "<u1"
"""The type of a mark."""
CHUNK_TOKENS = 2**20
"""Number of tokens that are counted at a time, in 8 MiB."""


@dataclass(frozen=True)
class Counts:
    """What was read to prepare tokens."""

    files: int
    documents: tuple[int, int]
    """Numbers of documents for training and for validation."""
    bytes: tuple[int, int]
    """Their sizes as UTF-8."""
    unread_keys: Mapping[str, int]
    """How many records have a key that is not read. `Unread` bounds the number of these keys."""
    further_keys: int = 0
    """How often records have further keys. 0 also if an earlier version prepared the tokens."""
    blank: int = 0
    """Number of documents that are blank and left out. 0 also if an earlier version prepared the tokens."""
    unanswered: int = 0
    """Number of conversations without an answer, which are left out."""
    bad: Mapping[str, int] = field(default_factory=dict)
    """How many records `data.skip_bad` left out, by the reason."""


@dataclass(frozen=True, eq=False)
class TokenizedText:
    """Prepared tokens, and what a model has to know about them."""

    tokenizer_dir: Path
    vocab_size: int
    bos_id: int | None
    eos_id: int
    begins_with_bos: bool
    """Whether the beginning-of-text token leads each document."""
    train: np.ndarray
    """Token ids, mapped from disk. Shape [tokens]."""
    validation: np.ndarray
    unigram_nats: float
    """Loss per validation token of a unigram model that counts the training tokens, each count plus one."""
    train_marks: np.ndarray | None = None
    """For conversations: which tokens begin one, and which are learned (rows.py). Shape: uint8 [tokens]."""
    validation_marks: np.ndarray | None = None
    counts: Counts | None = None
    """None if an earlier version prepared the tokens."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """How many files below the named folders are not read, by the reason."""
    cut: Mapping[str, Cut] = field(default_factory=dict)
    """What became of conversations in the rows of a run, for training and validation."""

    @property
    def folder(self) -> Path:
        """Returns the prepared folder."""
        return self.tokenizer_dir.parent

    @property
    def key(self) -> str:
        """Returns the content key. Equal keys mean equal tokens."""
        return self.folder.name


@dataclass(frozen=True)
class _Meta:
    """The contents of meta.json."""

    format: int
    dtype: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    train_tokens: int
    validation_tokens: int
    unigram_nats: float
    begins_with_bos: bool = False
    is_chat: bool = False
    counts: dict | None = None
    """A `Counts`, which earlier versions did not write."""


def open_tokens(folder: Path) -> TokenizedText:
    """Opens a prepared folder. Raises: UserError when files are missing, damaged or too short."""
    meta = _read_meta(folder)
    return TokenizedText(
        tokenizer_dir=folder / TOKENIZER_DIR,
        vocab_size=meta.vocab_size,
        bos_id=meta.bos_id,
        eos_id=meta.eos_id,
        begins_with_bos=meta.begins_with_bos,
        train=_map_tokens(folder / TRAIN_FILE, meta.dtype, meta.train_tokens),
        validation=_map_tokens(folder / VALIDATION_FILE, meta.dtype, meta.validation_tokens),
        unigram_nats=meta.unigram_nats,
        train_marks=_map_tokens(folder / TRAIN_MARKS, MARK, meta.train_tokens) if meta.is_chat else None,
        validation_marks=_map_tokens(folder / VALIDATION_MARKS, MARK, meta.validation_tokens) if meta.is_chat else None,
        counts=None if meta.counts is None else _counts_of(**meta.counts),
    )


def _counts_of(documents: list[int], bytes: list[int], **others: Any) -> Counts:
    return Counts(documents=(documents[0], documents[1]), bytes=(bytes[0], bytes[1]), **others)


def write_meta(folder: Path, vocabulary: Vocabulary, encoding: Encoding, counts: Counts) -> None:
    """Counts the tokens of both files and writes meta.json."""
    train, validation = (np.memmap(folder / name, encoding.dtype, "r") for name in (TRAIN_FILE, VALIDATION_FILE))
    names = (TRAIN_MARKS, VALIDATION_MARKS)
    marks = [np.memmap(folder / name, MARK, "r") if encoding.is_chat else None for name in names]
    learned = [_count(tokens, own, vocabulary.size) for tokens, own in zip((train, validation), marks, strict=True)]
    meta = _Meta(
        format=FORMAT,
        dtype=encoding.dtype,
        vocab_size=vocabulary.size,
        bos_id=vocabulary.bos_id,
        eos_id=vocabulary.eos_id,
        begins_with_bos=encoding.bos_id is not None,
        train_tokens=len(train),
        validation_tokens=len(validation),
        is_chat=encoding.is_chat,
        unigram_nats=_unigram_nats(*learned),
        counts=asdict(counts),
    )
    (folder / META_FILE).write_text(json.dumps(asdict(meta), indent=1) + "\n", encoding="utf-8")


def _count(tokens: np.ndarray, marks: np.ndarray | None, vocab_size: int) -> np.ndarray:
    """Returns how often each token is learned. Shape [vocab_size]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        learned = tokens[part] if marks is None else tokens[part][marks[part] & TARGET > 0]
        counts += np.bincount(learned, minlength=vocab_size)
    return counts


def _unigram_nats(train_counts: np.ndarray, validation_counts: np.ndarray) -> float:
    """Returns the nats per validation token under the training counts, each plus one. Shapes: [vocab_size] both."""
    smoothed = train_counts + 1
    return float(-(validation_counts * np.log(smoothed / smoothed.sum())).sum() / validation_counts.sum())


def _read_meta(folder: Path) -> _Meta:
    path = folder / META_FILE
    try:
        meta = _Meta(**json.loads(path.read_text(encoding="utf-8")))
        np.dtype(meta.dtype)
    except (OSError, ValueError, TypeError) as error:
        raise _damage_error(folder, f"{META_FILE} cannot be read ({error})") from error
    if meta.format != FORMAT:
        raise _damage_error(folder, f"{META_FILE} has format {meta.format}, not {FORMAT}")
    return meta


def _map_tokens(path: Path, dtype: str, num_tokens: int) -> np.ndarray:
    expected = num_tokens * np.dtype(dtype).itemsize
    found = path.stat().st_size if path.is_file() else 0
    if found != expected:
        raise _damage_error(path.parent, f"{path.name} has {found} bytes instead of {expected}")
    return np.memmap(path, dtype, "r")


def _damage_error(folder: Path, reason: str) -> UserError:
    return UserError(f"{folder}: {reason}. Delete the folder and run `sorted-ds prepare RUN.toml` again.")
