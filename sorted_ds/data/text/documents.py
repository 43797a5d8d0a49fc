"""The documents in the files: texts unchanged, and conversations as the tokenizer's chat template writes them.

In: a `Source`, and how its records are read. Out: its documents in order, and counts of what was left out. A text file
is one document, and each record of another file is one. A byte order mark at the start of a document is not part of its
text.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from sorted_ds.data.chat.conversation import TOOLS, Conversation, of_messages, of_prompt
from sorted_ds.data.chat.template import ChatTemplate
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
"""Unread keys whose first characters, up to this number, are the same are counted as one."""


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
    def is_chat(self) -> bool:
        """Returns whether the records are conversations."""
        return self.form != "text"

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
    unanswered: int = 0
    """Number of conversations without an answer."""
    bad: Counter[str] = field(default_factory=Counter)
    """How many records `data.skip_bad` left out, by the reason."""

    def add_keys(self, keys: Iterable[str], num_records: int = 1) -> None:
        """Counts keys that this number of records have."""
        for key in (key[:KEY_CHARACTERS] for key in keys):
            if key in self.keys or len(self.keys) < MOST_KEYS:
                self.keys[key] += num_records
            else:
                self.further_keys += num_records


class Reader:
    """Reads the documents of files, all in the same way."""

    def __init__(self, reading: Reading = PLAIN, template: ChatTemplate | None = None):
        """`template` writes conversations, if the records hold some."""
        self.reading, self.template = reading, template
        self.wanted = (*reading.fields, TOOLS) if reading.form == "messages" else reading.fields

    def documents(self, source: Source, unread: Unread | None = None) -> Iterator[Document]:
        """Yields the documents of a file in order, except blank ones and conversations without an answer.

        `unread` counts what is left out.

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
            if document is not None:
                yield document

    def _found(self, source: Source, unread: Unread) -> Iterator[Callable[[], Document | None]]:
        """Yields a function for each document, which makes it, or counts it and returns None."""
        if source.kind == "text":
            yield partial(_whole_file, source.path, unread)
            return
        for where, record in records(source.path, source.kind, self.wanted, unread.add_keys):
            yield partial(self._document, where, record, unread)

    def _document(self, where: str, record: bytes | Fields, unread: Unread) -> Document | None:
        fields = fields_of(where, record)
        if self.reading.is_chat:
            document = self._chat(where, fields, unread)
        else:
            document = _text(text_in(where, fields, self.reading.fields[0]), unread)
        unread.add_keys(key for key in fields if key not in self.wanted)
        return document

    def _chat(self, where: str, fields: Fields, unread: Unread) -> Document | None:
        assert self.template is not None
        conversation = self._conversation(where, fields)
        if conversation.is_empty:
            unread.blank += 1
        elif not conversation.is_answered:
            unread.unanswered += 1
        else:
            document = self.template.render(conversation, where)
            whole(where, document.text)
            return document
        return None

    def _conversation(self, where: str, fields: Fields) -> Conversation:
        if self.reading.form == "messages":
            return of_messages(where, fields, self.reading.fields[0])
        return of_prompt(*(text_in(where, fields, name) for name in self.reading.fields))


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


def _whole_file(path: Path, unread: Unread) -> Document | None:
    return _text(decode(path.read_bytes().removeprefix(BYTE_ORDER_MARK), str(path)), unread)


def _text(text: str, unread: Unread) -> Document | None:
    text = text.removeprefix("\ufeff")
    if text and not text.isspace():
        return Document(text)
    unread.blank += 1
    return None
