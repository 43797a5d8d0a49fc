"""Prepares text as tokens on disk, once for each content and settings.

    CACHE_DIR/<content key>/    the files that tokens.py describes
    CACHE_DIR/hashes.json       hashes of the text files

In: a `DataSpec`. Out: `TokenizedText`, its tokens mapped from disk. A folder is written under a hidden name and renamed
when it is complete. So it is complete or invisible, even if other processes prepare the same text at the same time.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sorted_ds.base.errors import UserError
from sorted_ds.base.files import replaced
from sorted_ds.data.text.content_key import content_key, tokenizer_identity
from sorted_ds.data.text.encode import Encoding, OnProgress, token_dtype, write_tokens
from sorted_ds.data.text.sources import Source, documents, find_files
from sorted_ds.data.text.split import split_documents
from sorted_ds.data.text.tokenizer import (
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
    training_excerpts,
    vocabulary_of,
)
from sorted_ds.data.text.tokens import TOKENIZER_DIR, TokenizedText, open_tokens, write_meta

TRAIN_A_TOKENIZER = "train"
"""The value of `data.tokenizer` with which a tokenizer is trained on the run's text."""


@dataclass(frozen=True)
class DataSpec:
    """Everything that decides the prepared tokens."""

    text: tuple[Path, ...]
    jsonl: tuple[Path, ...]
    suffixes: tuple[str, ...]
    """Suffixes of the files that are taken from folders in `text`."""
    tokenizer: str
    """"train", a directory, or a hub id."""
    vocab_size: int
    """Size of the vocabulary of a tokenizer that is trained. Not used for other tokenizers."""
    validation_fraction: float
    """Share of the documents that is for validation."""
    seed: int


def prepare(
    spec: DataSpec, cache_dir: Path, workers: int, on_progress: OnProgress = lambda done, total: None
) -> TokenizedText:
    """Returns the tokens of `spec`, and prepares them first if necessary.

    Raises: UserError when the text or the tokenizer cannot be used, prepared files are damaged, or the disk is full.
    """
    sources = find_files(spec.text, spec.jsonl, spec.suffixes)
    try:
        folder = cache_dir / _key(spec, sources, cache_dir, workers)
        if not folder.exists():
            _prepare_folder(spec, sources, folder, workers, on_progress)
    except OSError as error:
        raise UserError(
            f"data could not be prepared in {cache_dir}: {error}. Free disk space, correct the permissions, or set "
            "another data.cache_dir."
        ) from error
    return open_tokens(folder)


def find_prepared(spec: DataSpec, cache_dir: Path, workers: int = 1) -> TokenizedText:
    """Returns the tokens of `spec`. Raises: UserError when they are not prepared, or damaged."""
    sources = find_files(spec.text, spec.jsonl, spec.suffixes)
    folder = cache_dir / _key(spec, sources, cache_dir, workers)
    if not folder.exists():
        raise UserError(f"the run's text ({folder}) is not prepared. Run `sorted-ds prepare RUN.toml` first.")
    return open_tokens(folder)


def _key(spec: DataSpec, sources: Sequence[Source], cache_dir: Path, workers: int) -> str:
    settings = {
        "tokenizer": TRAIN_A_TOKENIZER if spec.tokenizer == TRAIN_A_TOKENIZER else tokenizer_identity(spec.tokenizer),
        "vocab_size": spec.vocab_size if spec.tokenizer == TRAIN_A_TOKENIZER else None,
        "validation_fraction": spec.validation_fraction,
        "seed": spec.seed,
    }
    return content_key(sources, settings, cache_dir, workers)


def _prepare_folder(
    spec: DataSpec, sources: Sequence[Source], folder: Path, workers: int, on_progress: OnProgress
) -> None:
    # If the folder has come meanwhile, another process was faster and has written the same bytes.
    with suppress(FileExistsError), replaced(folder, durable=True, overwrite=False) as hidden:
        hidden.mkdir()
        _write_contents(spec, sources, hidden, workers, on_progress)
        if _key(spec, sources, folder.parent, workers) != folder.name:
            raise UserError("data: the text changed while it was being prepared. Start again.")


def _write_contents(
    spec: DataSpec, sources: Sequence[Source], hidden: Path, workers: int, on_progress: OnProgress
) -> None:
    split = split_documents(_all_documents(sources), spec.validation_fraction, spec.seed)
    if spec.tokenizer == TRAIN_A_TOKENIZER:
        training = (text for text in _all_documents(sources) if not split.is_validation(text))
        train_tokenizer(training_excerpts(training, split.num_characters), spec.vocab_size, hidden / TOKENIZER_DIR)
        tokenizer = load_tokenizer(str(hidden / TOKENIZER_DIR))
    else:
        tokenizer = load_tokenizer(spec.tokenizer)
        save_tokenizer(tokenizer, hidden / TOKENIZER_DIR)
    vocabulary = vocabulary_of(tokenizer)
    encoding = Encoding(hidden / TOKENIZER_DIR / "tokenizer.json", vocabulary.eos_id, token_dtype(vocabulary.size))
    sided = ((text, split.is_validation(text)) for text in _all_documents(sources))
    write_tokens(sided, encoding, hidden, workers, split.num_characters, on_progress)
    write_meta(hidden, vocabulary, encoding.dtype)


def _all_documents(sources: Sequence[Source]) -> Iterator[str]:
    return (text for source in sources for text in documents(source))
