"""The documents in the files: texts unchanged, and conversations as the tokenizer's chat template writes them.

In: a `Source`, and how its records are read. Out: its documents in order, and counts of what was left out. A text file
is one document, and each record of another file is one. A byte order mark at the start of a document is no text.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from sorted_ds.data.text.document import Document
from sorted_ds.data.text.records import BYTE_ORDER_MARK, BadRecordError, Fields, decode, fields_of, records
from sorted_ds.data.text.sources import Source

Form = Literal["text", "messages", "prompt_response"]
FIELDS: dict[Form, tuple[str, ...]] = {
    "text": ("text",),
    "messages": ("messages",),
    "prompt_response": ("prompt", "response"),
}
"""The fields of a record that are read, by the form of the records."""
MOST_KEYS = 1_000
"""Number of different unread keys that are counted one by one."""
KEY_CHARACTERS = 64
"""Unread keys that begin with the same so many characters are counted as one."""


@dataclass(frozen=True)
class Reading:
    """How the records of files become documents."""

    form: Form = "text"
    names: tuple[str, ...] = ()
    """The names of the fields, if they are not those of `FIELDS`."""
    skip_bad: bool = False
    """Whether records that cannot be used are left out. Otherwise they are errors."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Returns the names of the fields that each record must have."""
        return self.names or FIELDS[self.form]

    @property
    def identity(self) -> dict[str, object]:
        """Returns what of the reading decides the documents. It is empty for what version 0.1 did."""
        facts: dict[str, object] = {"form": self.form, "fields": self.fields, "skip_bad": self.skip_bad}
        return {} if self == PLAIN else facts


PLAIN = Reading()
"""Records with a field `text`, as version 0.1 read them."""


@dataclass
class Unread:
    """Counts what of the documents is not read."""

    blank: int = 0
    """Number of documents that are empty or only whitespace."""
    keys: Counter[str] = field(default_factory=Counter)
    """How many records have a key that is not read, for the first `MOST_KEYS` keys."""
    further_keys: int = 0
    """How often records have any other key."""
    bad: Counter[str] = field(default_factory=Counter)
    """How many records `data.skip_bad` left out, by the reason."""

    def add_keys(self, keys: Iterable[str], num_records: int = 1) -> None:
        """Counts keys that so many records have."""
        for key in (key[:KEY_CHARACTERS] for key in keys):
            if key in self.keys or len(self.keys) < MOST_KEYS:
                self.keys[key] += num_records
            else:
                self.further_keys += num_records


class Reader:
    """Reads the documents of files, all in the same way."""

    def __init__(self, reading: Reading = PLAIN):
        self.reading = reading

    def documents(self, source: Source, unread: Unread | None = None) -> Iterator[Document]:
        """Yields the documents of a file in order, except blank ones. `unread` counts what is left out.

        Raises: UserError for a file that is damaged; BadRecordError for a record that cannot be used, unless those are
        skipped.
        """
        unread = Unread() if unread is None else unread
        for make in self._found(source, unread):
            try:
                document = make()
            except BadRecordError as error:
                if not self.reading.skip_bad:
                    raise
                unread.bad[error.what] += 1
                continue
            if document.text and not document.text.isspace():
                yield document
            else:
                unread.blank += 1

    def _found(self, source: Source, unread: Unread) -> Iterator[Callable[[], Document]]:
        """Yields a function for each document, which makes it."""
        if source.kind == "text":
            yield partial(_whole_file, source.path)
            return
        for where, record in records(source.path, source.kind, self.reading.fields, unread.add_keys):
            yield partial(self._document, where, record, unread)

    def _document(self, where: str, record: bytes | Fields, unread: Unread) -> Document:
        fields = fields_of(where, record)
        document = _text(text_in(where, fields, self.reading.fields[0]))
        unread.add_keys(key for key in fields if key not in self.reading.fields)
        return document


def text_in(where: str, fields: Fields, name: str) -> str:
    """Returns the text in a field of a record. Raises: BadRecordError if there is none."""
    text = fields.get(name)
    if not isinstance(text, str):
        raise BadRecordError(where, f'no string "{name}"', f'has no string "{name}" (data.fields names the field)')
    return whole(where, text)


def whole(where: str, text: str) -> str:
    """Returns a text of a record. Raises: BadRecordError if it holds half a character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f'"\\u{ord(text[error.start]):04x}" without its other half'
        raise BadRecordError(where, "half a character", f"has a text with half a character, {half}") from error
    return text


def _whole_file(path: Path) -> Document:
    return _text(decode(path.read_bytes().removeprefix(BYTE_ORDER_MARK), str(path)))


def _text(text: str) -> Document:
    return Document(text.removeprefix("\ufeff"))
