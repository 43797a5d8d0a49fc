"""Prepared tokens on disk.

    FOLDER/tokenizer/       an ordinary Hugging Face tokenizer
    FOLDER/train.bin        token ids, flat, little-endian, each document followed by the end-of-text token
    FOLDER/validation.bin
    FOLDER/meta.json        what the two hold

In: a folder. Out: `TokenizedText`, its tokens mapped from disk and checked for their length.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sorted_ds.base.errors import UserError
from sorted_ds.data.text.content_key import FORMAT
from sorted_ds.data.text.encode import TRAIN_FILE, VALIDATION_FILE
from sorted_ds.data.text.tokenizer import Vocabulary

META_FILE = "meta.json"
TOKENIZER_DIR = "tokenizer"
CHUNK_TOKENS = 2**24
"""Tokens that are counted at a time."""


@dataclass(frozen=True, eq=False)
class TokenizedText:
    """Prepared tokens."""

    tokenizer_dir: Path
    vocab_size: int
    bos_id: int | None
    eos_id: int
    train: np.ndarray
    """Ids, mapped from disk. Shape [tokens]."""
    validation: np.ndarray
    unigram_nats: float
    """Nats per token of the validation tokens under the counts of the training tokens, each count plus one."""

    @property
    def folder(self) -> Path:
        """Where the tokens lie."""
        return self.tokenizer_dir.parent

    @property
    def key(self) -> str:
        """The content key: equal keys, equal tokens."""
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


def open_tokens(folder: Path) -> TokenizedText:
    """A prepared folder. Raises: UserError when files are missing, damaged or cut short."""
    meta = _read_meta(folder)
    return TokenizedText(
        tokenizer_dir=folder / TOKENIZER_DIR,
        vocab_size=meta.vocab_size,
        bos_id=meta.bos_id,
        eos_id=meta.eos_id,
        train=_map(folder / TRAIN_FILE, meta.dtype, meta.train_tokens),
        validation=_map(folder / VALIDATION_FILE, meta.dtype, meta.validation_tokens),
        unigram_nats=meta.unigram_nats,
    )


def write_meta(folder: Path, vocabulary: Vocabulary, dtype: str) -> None:
    """Counts what the two token files hold, and describes it in meta.json."""
    train, validation = (np.memmap(folder / name, dtype, "r") for name in (TRAIN_FILE, VALIDATION_FILE))
    meta = _Meta(
        format=FORMAT,
        dtype=dtype,
        vocab_size=vocabulary.size,
        bos_id=vocabulary.bos_id,
        eos_id=vocabulary.eos_id,
        train_tokens=len(train),
        validation_tokens=len(validation),
        unigram_nats=unigram_nats(_count(train, vocabulary.size), _count(validation, vocabulary.size)),
    )
    (folder / META_FILE).write_text(json.dumps(asdict(meta), indent=1) + "\n", encoding="utf-8")


def _count(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), CHUNK_TOKENS):
        counts += np.bincount(tokens[start : start + CHUNK_TOKENS], minlength=vocab_size)
    return counts


def unigram_nats(train_counts: np.ndarray, validation_counts: np.ndarray) -> float:
    """Nats per validation token under the training counts, each plus one. Shapes: [vocab_size] both."""
    smoothed = train_counts + 1
    return float(-(validation_counts * np.log(smoothed / smoothed.sum())).sum() / validation_counts.sum())


def _read_meta(folder: Path) -> _Meta:
    path = folder / META_FILE
    try:
        meta = _Meta(**json.loads(path.read_text(encoding="utf-8")))
        np.dtype(meta.dtype)
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(folder, f"{META_FILE} cannot be read ({error})") from error
    if meta.format != FORMAT:
        raise _damaged(folder, f"{META_FILE} is of format {meta.format}, not {FORMAT}")
    return meta


def _map(path: Path, dtype: str, num_tokens: int) -> np.ndarray:
    expected = num_tokens * np.dtype(dtype).itemsize
    found = path.stat().st_size if path.is_file() else 0
    if found != expected:
        raise _damaged(path.parent, f"{path.name} has {found} bytes, expected {expected}")
    return np.memmap(path, dtype, "r")


def _damaged(folder: Path, reason: str) -> UserError:
    return UserError(f"{folder}: {reason}. Delete the folder and run `sorted-ds prepare RUN.toml` again.")
