"""Prepares text as tokens on disk, once for each content and settings.

    CACHE_DIR/<content key>/    the files that tokens.py describes
    CACHE_DIR/file_hashes.json  hashes of the text files

In: a `DataSpec`. Out: `TokenizedText`, its tokens mapped from disk. A folder is written under a hidden name and renamed
when it is complete. So it is complete or invisible, even if other processes prepare the same text at the same time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sorted_ds.base.errors import UserError
from sorted_ds.base.files import replaced
from sorted_ds.base.names import TRAIN_A_TOKENIZER
from sorted_ds.data.chat.template import ChatTemplate
from sorted_ds.data.text.content_key import content_key
from sorted_ds.data.text.document import Document
from sorted_ds.data.text.documents import FIELDS, PLAIN, Reader, Reading, Unread
from sorted_ds.data.text.encode import Encoding, OnProgress, has_dropout, token_dtype, write_tokens
from sorted_ds.data.text.sources import TRAIN_SPLIT, Found, Source, find_files
from sorted_ds.data.text.split import Split, split_documents
from sorted_ds.data.text.tokenizer import (
    leads_with_bos,
    load_tokenizer,
    save_tokenizer,
    tokenizer_identity,
    train_tokenizer,
    training_excerpts,
    vocabulary_of,
)
from sorted_ds.data.text.tokens import TOKENIZER_DIR, Counts, TokenizedText, open_tokens, write_meta


@dataclass(frozen=True)
class DataSpec:
    """Everything that decides the prepared tokens."""

    text: tuple[Path, ...]
    files: tuple[str | Path, ...]
    """Files of records, folders of them, and data sets of the hub."""
    suffixes: tuple[str, ...]
    """Suffixes of the files that are taken from folders in `text`."""
    tokenizer: str
    """"train", a directory, or a hub id."""
    vocab_size: int
    """Size of the vocabulary of a tokenizer that is trained. Not used for other tokenizers."""
    validation_fraction: float
    """Share of the documents that is for validation."""
    seed: int
    bos: bool | None = None
    """Whether the beginning-of-text token leads each document; None for the tokenizer's own habit."""
    reading: Reading = PLAIN
    """How the records of `files` become documents."""
    subset: str = ""
    """The subset of a data set of the hub that has several."""
    split: str = TRAIN_SPLIT
    """The split of a data set that has several."""

    def reader(self) -> Reader:
        """Returns what reads the files. Raises: UserError when conversations have no chat template."""
        is_chat, name = self.reading.is_chat, self.tokenizer
        if is_chat and name == TRAIN_A_TOKENIZER:
            raise UserError(
                f'data.form = "{self.reading.form}" needs a tokenizer with a chat template, and one that is trained '
                "has none. Name the tokenizer of a chat model in data.tokenizer."
            )
        if is_chat and self.text:
            raise UserError(
                f'data.form = "{self.reading.form}" is for data.files, but data.text is set too. Remove data.text.'
            )
        if is_chat and self.bos is not None:
            raise UserError(
                f'data.form = "{self.reading.form}" lets the chat template write the beginning-of-text token. Remove '
                "data.bos."
            )
        wanted = FIELDS[self.reading.form]
        if len(self.reading.fields) != len(wanted):
            raise UserError(
                f'data.fields = {list(self.reading.names)}, but data.form = "{self.reading.form}" reads '
                f"{len(wanted)} of a record, by default {', '.join(wanted)}. Name {len(wanted)} in data.fields."
            )
        return Reader(self.reading, ChatTemplate(load_tokenizer(name), name) if is_chat else None)

    def found(self) -> Found:
        """Returns the files. Raises: UserError when some are missing."""
        return find_files(self.text, self.files, self.suffixes, self.subset, self.split)


def prepare(
    spec: DataSpec, cache_dir: Path, workers: int, on_progress: OnProgress = lambda done, total: None
) -> TokenizedText:
    """Returns the tokens of `spec`, and prepares them first if necessary.

    Raises: UserError when the text or the tokenizer cannot be used, prepared files are damaged, or the disk is full.
    """
    found = spec.found()
    try:
        folder = cache_dir / _key(spec, found.sources, cache_dir, workers)
        if not folder.exists():
            _prepare_folder(spec, found.sources, folder, workers, on_progress)
    except OSError as error:
        raise UserError(
            f"data could not be prepared in {cache_dir}: {error}. Free disk space, correct the permissions, or set "
            "another data.cache_dir."
        ) from error
    return replace(open_tokens(folder), left_out=found.left_out)


def find_prepared(spec: DataSpec, cache_dir: Path, workers: int = 1) -> TokenizedText:
    """Returns the tokens of `spec`. Raises: UserError when they are not prepared, or damaged."""
    found = spec.found()
    folder = cache_dir / _key(spec, found.sources, cache_dir, workers)
    if not folder.exists():
        raise UserError(f"the run's text ({folder}) is not prepared. Run `sorted-ds prepare RUN.toml` first.")
    return replace(open_tokens(folder), left_out=found.left_out)


def _key(spec: DataSpec, sources: Sequence[Source], cache_dir: Path, workers: int) -> str:
    settings: dict[str, object] = {"validation_fraction": spec.validation_fraction, "seed": spec.seed}
    settings |= spec.reading.identity
    if spec.tokenizer == TRAIN_A_TOKENIZER:
        settings |= {"tokenizer": TRAIN_A_TOKENIZER, "vocab_size": spec.vocab_size}
        has_bos = bool(spec.bos)
    else:
        tokenizer = load_tokenizer(spec.tokenizer)
        settings |= {"tokenizer": tokenizer_identity(spec.tokenizer, tokenizer), "vocab_size": None}
        has_bos = not spec.reading.is_chat and leads_with_bos(tokenizer, spec.bos)
        if has_dropout(tokenizer.backend_tokenizer):  # Earlier versions encoded with it, so their tokens are others.
            settings["dropout"] = False
    if has_bos:  # Keys without it are those of version 0.1.
        settings["bos"] = True
    return content_key(sources, settings, cache_dir, workers)


def _prepare_folder(
    spec: DataSpec, sources: Sequence[Source], folder: Path, workers: int, on_progress: OnProgress
) -> None:
    try:
        with replaced(folder, durable=True, overwrite=False) as hidden:
            hidden.mkdir()
            _write_contents(spec, sources, hidden, workers, on_progress)
            if _key(spec, sources, folder.parent, workers) != folder.name:
                raise UserError("data: the text changed while it was being prepared. Start again.")
    except FileExistsError:
        # If the folder has come meanwhile, another process was faster and has written the same bytes. Otherwise a file
        # has the place of the cache folder.
        if not folder.exists():
            raise


def _write_contents(
    spec: DataSpec, sources: Sequence[Source], hidden: Path, workers: int, on_progress: OnProgress
) -> None:
    reader = spec.reader()
    split = split_documents(_all_texts(reader, sources), spec.validation_fraction, spec.seed)
    if spec.tokenizer == TRAIN_A_TOKENIZER:
        training = (text for text in _all_texts(reader, sources) if not split.is_validation(text))
        excerpts = training_excerpts(training, split.num_characters)
        train_tokenizer(excerpts, spec.vocab_size, hidden / TOKENIZER_DIR, adds_bos=bool(spec.bos))
        tokenizer = load_tokenizer(str(hidden / TOKENIZER_DIR))
    else:
        tokenizer = load_tokenizer(spec.tokenizer)
        save_tokenizer(tokenizer, hidden / TOKENIZER_DIR)
    vocabulary = vocabulary_of(tokenizer)
    is_chat = spec.reading.is_chat
    bos_id = vocabulary.bos_id if not is_chat and leads_with_bos(tokenizer, spec.bos) else None
    tokenizer_file = hidden / TOKENIZER_DIR / "tokenizer.json"
    encoding = Encoding(tokenizer_file, bos_id, vocabulary.eos_id, token_dtype(vocabulary.size), is_chat)
    census = Census(reader, split)
    write_tokens(census.sided(sources), encoding, hidden, workers, split.num_characters, on_progress)
    write_meta(hidden, vocabulary, encoding, census.counts(len(sources)))


class Census:
    """Decides for each document on which side it is, and counts what was read."""

    def __init__(self, reader: Reader, split: Split):
        self.reader, self.split = reader, split
        self.documents, self.bytes = [0, 0], [0, 0]
        self.unread = Unread()

    def sided(self, sources: Sequence[Source]) -> Iterator[tuple[Document, bool]]:
        """Yields all documents in order, each with whether it is for validation."""
        for source in sources:
            for document in self.reader.documents(source, self.unread):
                text = document.text
                is_validation = self.split.is_validation(text)
                self.documents[is_validation] += 1
                self.bytes[is_validation] += len(text.encode())
                yield document, is_validation

    def counts(self, num_files: int) -> Counts:
        """Returns what was counted."""
        (train, validation), (train_bytes, validation_bytes) = self.documents, self.bytes
        return Counts(
            files=num_files,
            documents=(train, validation),
            bytes=(train_bytes, validation_bytes),
            unread_keys=dict(self.unread.keys),
            further_keys=self.unread.further_keys,
            blank=self.unread.blank,
            unanswered=self.unread.unanswered,
            bad=dict(self.unread.bad),
        )


def _all_texts(reader: Reader, sources: Sequence[Source]) -> Iterator[str]:
    return (document.text for source in sources for document in reader.documents(source))
