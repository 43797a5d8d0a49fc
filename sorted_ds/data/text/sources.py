"""The sources of the text: files in a fixed order, and the documents in each file.

In: `data.text` and `data.jsonl` of the run file. Out: `Source` values, and the documents of each, unchanged. On disk:
UTF-8 text files, each of which is one document, and JSONL files, each line of which is one document.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sorted_ds.base.errors import UserError

JSONL_SUFFIX = ".jsonl"
JSONL_FIELD = "text"


@dataclass(frozen=True)
class Source:
    """A file that holds documents."""

    path: Path
    kind: Literal["text", "jsonl"]


def find_files(text: Sequence[Path], jsonl: Sequence[Path], suffixes: Sequence[str]) -> list[Source]:
    """Returns the files in the order in which they are named, `text` first.

    A folder stands for all files below it that have one of the suffixes, by sorted path. A file that is named itself
    may have any suffix.

    Raises: UserError when a path does not exist, a folder holds no such file, or nothing is named.
    """
    sources = [Source(path, "text") for named in text for path in _files_of(named, "data.text", suffixes)]
    sources += [Source(path, "jsonl") for named in jsonl for path in _files_of(named, "data.jsonl", [JSONL_SUFFIX])]
    if not sources:
        raise UserError("data names no text. Set data.text or data.jsonl.")
    return sources


def _files_of(named: Path, key: str, suffixes: Sequence[str]) -> list[Path]:
    if not named.exists():
        raise UserError(f"{key}: {named.absolute()} does not exist. Correct the path (relative to the run file).")
    if not named.is_dir():
        return [named]
    found = sorted(path for path in named.rglob("*") if path.suffix in suffixes and path.is_file())
    if not found:
        change = "data.suffixes" if key == "data.text" else key
        raise UserError(f"{key}: {named.absolute()} holds no file ending in {', '.join(suffixes)}. Correct {change}.")
    return found


def documents(source: Source) -> Iterator[str]:
    """Yields the documents of a file in order, except those that are only whitespace.

    Raises: UserError for a file that is not UTF-8, or a JSONL line without text.
    """
    found = _jsonl_documents(source.path) if source.kind == "jsonl" else _text_document(source.path)
    return (document for document in found if not document.isspace() and document)


def _text_document(path: Path) -> Iterator[str]:
    yield _decode(path.read_bytes(), str(path))


def _jsonl_documents(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _parse_line(_decode(line, f"{path}:{number}"), f"{path}:{number}")


def _parse_line(line: str, where: str) -> str:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON ({error}). Correct or remove the line.") from error
    text = fields.get(JSONL_FIELD) if isinstance(fields, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where} is not a JSON object with a string "{JSONL_FIELD}". Correct or remove the line.')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {_surrogate_message(text[error.start])}. Correct or remove the line.") from error
    return text


def _surrogate_message(surrogate: str) -> str:
    return f'the text holds half a character, "\\u{ord(surrogate):04x}" without its other half'


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}). Convert it, or leave it out."
        ) from error
