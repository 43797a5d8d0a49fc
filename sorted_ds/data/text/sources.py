"""The sources of the text: files in a fixed order, and the documents in each file.

In: `data.text` and `data.jsonl` of the run file. Out: `Source` values, the documents of each, unchanged, and what was
left out. On disk: UTF-8 text files, each of which is one document, and JSONL files, each line of which is one document.
A byte order mark at the start of a file is no text.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sorted_ds.base.errors import UserError

JSONL_SUFFIX = ".jsonl"
JSONL_FIELD = "text"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Some editors write this before UTF-8 text."""
MOST_KEYS = 1_000
"""Number of different unread keys that are counted one by one."""
KEY_CHARACTERS = 64
"""Unread keys that begin with the same so many characters are counted as one."""


@dataclass(frozen=True)
class Source:
    """A file that holds documents."""

    path: Path
    kind: Literal["text", "jsonl"]


@dataclass(frozen=True)
class Found:
    """The files of a run's text, and what its folders hold besides."""

    sources: list[Source]
    left_out: Counter[str] = field(default_factory=Counter)
    """How many files were left out, by the reason."""


@dataclass
class Unread:
    """Counts what of the documents is not read."""

    blank: int = 0
    """Number of documents that are empty or only whitespace."""
    keys: Counter[str] = field(default_factory=Counter)
    """How many JSONL lines have a key beside the text, for the first `MOST_KEYS` keys."""
    further_keys: int = 0
    """How often JSONL lines have any other key."""

    def add_keys(self, keys: Iterable[str]) -> None:
        """Counts the keys of a line."""
        for key in (key[:KEY_CHARACTERS] for key in keys if key != JSONL_FIELD):
            if key in self.keys or len(self.keys) < MOST_KEYS:
                self.keys[key] += 1
            else:
                self.further_keys += 1


def find_files(text: Sequence[Path], jsonl: Sequence[Path], suffixes: Sequence[str]) -> Found:
    """Returns the files in the order in which they are named, `text` first.

    A folder stands for all files below it whose names end with one of the suffixes, by sorted path. A file that is
    named itself may have any suffix. Links are followed. A file is taken once, where it is named first, even if several
    paths or links lead to it.

    Raises: UserError when a path does not exist, a folder cannot be read or holds no such file, or nothing is named.
    """
    found = Found([])
    for named in text:
        found.sources.extend(Source(path, "text") for path in _files_of(named, "data.text", suffixes, found.left_out))
    for named in jsonl:
        paths = _files_of(named, "data.jsonl", [JSONL_SUFFIX], found.left_out)
        found.sources.extend(Source(path, "jsonl") for path in paths)
    if not found.sources:
        raise UserError("data names no text. Set data.text or data.jsonl.")
    return _each_once(found) if len(text) + len(jsonl) > 1 else found


def _each_once(found: Found) -> Found:
    seen: set[str] = set()
    sources = [source for source in found.sources if _is_new(source.path, seen)]
    if len(sources) < len(found.sources):
        found.left_out["named more than once"] += len(found.sources) - len(sources)
    return Found(sources, found.left_out)


def _files_of(named: Path, key: str, suffixes: Sequence[str], left_out: Counter[str]) -> list[Path]:
    """Returns the files that a path of the run file stands for, and counts those that are left out."""
    if not named.exists():
        raise UserError(f"{key}: {named.absolute()} does not exist. Correct the path (relative to the run file).")
    if not named.is_dir():
        return [named]
    taken = []
    for path in _below(named, key):
        if path.is_symlink() and not path.exists():
            left_out["a link to nothing"] += 1
        elif not path.name.endswith(tuple(suffixes)):
            left_out[f"ending in {path.suffix}" if path.suffix else "without an ending"] += 1
        elif path.is_file():
            taken.append(path)
        else:
            left_out["not a file"] += 1
    if not taken:
        change = "data.suffixes" if key == "data.text" else key
        raise UserError(f"{key}: {named.absolute()} holds no file ending in {', '.join(suffixes)}. Correct {change}.")
    once = _once(sorted(taken))
    if len(once) < len(taken):
        left_out["a second link to the same file"] += len(taken) - len(once)
    return once


def _below(folder: Path, key: str) -> Iterator[Path]:
    """Yields all below a folder that is no folder itself. It enters each folder once, also if links lead to it."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{key}: {error.filename} cannot be read ({error.strerror}). Make it readable, or move it.")

    entered = {os.path.realpath(folder)}
    for path, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in sorted(folders) if _is_new(Path(path, name), entered)]
        yield from (Path(path, name) for name in files)


def _is_new(path: Path, seen: set[str]) -> bool:
    """Returns whether a file or folder was not seen before under any path, and adds it to those that were."""
    real = os.path.realpath(path)
    is_new = real not in seen
    seen.add(real)
    return is_new


def _once(paths: Sequence[Path]) -> list[Path]:
    """Returns the paths without links to a file that another of the paths is."""
    links = [path for path in paths if path.is_symlink()]
    if not links:
        return list(paths)
    seen = {os.path.realpath(path) for path in paths if not path.is_symlink()}
    doubled = {path for path in links if not _is_new(path, seen)}
    return [path for path in paths if path not in doubled]


def documents(source: Source, unread: Unread | None = None) -> Iterator[str]:
    """Yields the documents of a file in order, except blank ones. `unread` counts these, and keys beside the text.

    Raises: UserError for a file that is not UTF-8, or a JSONL line without text.
    """
    unread = Unread() if unread is None else unread
    found = _jsonl_documents(source.path, unread) if source.kind == "jsonl" else _text_document(source.path)
    for text in found:
        document = text.removeprefix("\ufeff")  # A byte order mark is no text, in a JSONL field either.
        if document and not document.isspace():
            yield document
        else:
            unread.blank += 1


def _text_document(path: Path) -> Iterator[str]:
    yield _decode(path.read_bytes().removeprefix(BYTE_ORDER_MARK), str(path))


def _jsonl_documents(path: Path, unread: Unread) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if line.strip():
                fields = _parse_line(_decode(line, f"{path}:{number}"), f"{path}:{number}")
                unread.add_keys(fields)
                yield fields[JSONL_FIELD]


def _parse_line(line: str, where: str) -> dict[str, Any]:
    """Returns the fields of a JSONL line, which has a text."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}). Correct or remove the line.") from error
    text = fields.get(JSONL_FIELD) if isinstance(fields, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where} is not a JSON object with a string "{JSONL_FIELD}". Correct or remove the line.')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {_surrogate_message(text[error.start])}. Correct or remove the line.") from error
    return fields


def _surrogate_message(surrogate: str) -> str:
    return f'the text holds half a character, "\\u{ord(surrogate):04x}" without its other half'


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}). Convert it, or leave it out."
        ) from error
