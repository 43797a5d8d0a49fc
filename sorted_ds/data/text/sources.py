"""The sources of the text: files in a fixed order.

In: `data.text` and `data.files` of the run file. Out: `Source` values, and what was left out. On disk: UTF-8 text
files, each of which is one document, and files of records (records.py).
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sorted_ds.base.errors import UserError
from sorted_ds.data.text.data_sets import HUB_ID, hub_files, is_saved, saved_files
from sorted_ds.data.text.records import KINDS, kind_of

TRAIN_SPLIT = "train"
ENDING = "ending in "
"""Stands before the suffix of files that are left out."""


@dataclass(frozen=True)
class Source:
    """A file that holds documents."""

    path: Path
    kind: str
    """How it is read: `text`, `arrow`, or one of the values of `KINDS`."""


@dataclass(frozen=True)
class Found:
    """The files of a run's text, and what its folders hold besides."""

    sources: list[Source]
    left_out: Counter[str] = field(default_factory=Counter)
    """How many files were left out, by the reason."""


def find_files(
    text: Sequence[Path],
    files: Sequence[str | Path],
    suffixes: Sequence[str],
    subset: str = "",
    split: str = TRAIN_SPLIT,
) -> Found:
    """Returns the files in the order in which they are named, `text` first.

    A folder stands for all files below it whose names end with one of the suffixes, or with one of `KINDS`, by sorted
    path. A directory of `save_to_disk` and a hub id stand for the files of their `split`. A file that is named itself
    may have any suffix. Links are followed. A file is taken once, where it is named first, even if several paths or
    links lead to it.

    Raises: UserError when a path does not exist, a folder cannot be read or holds no such file, or nothing is named.
    """
    found = Found([])
    for named in text:
        found.sources.extend(Source(path, "text") for path in _files_of(named, "data.text", suffixes, found.left_out))
    for entry in files:
        found.sources.extend(_of_records(entry, subset, split, found.left_out))
    if not found.sources:
        raise UserError("data names no text. Set data.text or data.files.")
    return _each_once(found) if len(text) + len(files) > 1 else found


def _of_records(entry: str | Path, subset: str, split: str, left_out: Counter[str]) -> list[Source]:
    named = Path(entry)
    if not named.exists() and HUB_ID.fullmatch(str(entry)) and kind_of(named) == "jsonl" and not named.suffix:
        return [Source(path, "arrow") for path in hub_files(str(entry), subset, split)]
    if named.is_dir() and is_saved(named):
        return [Source(path, "arrow") for path in saved_files(named, split)]
    return [Source(path, kind_of(path)) for path in _files_of(named, "data.files", list(KINDS), left_out)]


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
            left_out[f"{ENDING}{path.suffix}" if path.suffix else "without an ending"] += 1
        elif path.is_file():
            taken.append(path)
        else:
            left_out["not a file"] += 1
    if not taken:
        raise UserError(
            f"{key}: {named.absolute()} holds no file ending in {', '.join(suffixes)}. {_other_suffixes(key, left_out)}"
        )
    once = _once(sorted(taken))
    if len(once) < len(taken):
        left_out["a second link to the same file"] += len(taken) - len(once)
    return once


def _other_suffixes(key: str, left_out: Mapping[str, int]) -> str:
    """Returns what to change if a folder holds no file with one of the suffixes."""
    found = [what.removeprefix(ENDING) for what in left_out if what.startswith(ENDING)]
    if key != "data.text" or not found:
        return f"Correct {key}."
    most = max(found, key=lambda suffix: left_out[ENDING + suffix])
    return f'To read those that end in {most}, set data.suffixes = ["{most}"].'


def _below(folder: Path, key: str) -> Iterator[Path]:
    """Yields all below a folder that is not a folder itself. It enters each folder once, also if links lead to it."""

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
