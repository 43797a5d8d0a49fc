"""Data sets of Hugging Face's `datasets`: saved with `save_to_disk`, or found by their id on the hub.

In: a directory, or a hub id. Out: the Arrow files that hold the records. On disk: for a hub id, the cache of
`datasets`. It runs no code of a data set: since its version 4 it reads only data files.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from sorted_ds.base.errors import UserError, naming, reason_of
from sorted_ds.base.extras import needed

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""An id like `HuggingFaceTB/smoltalk`. A path that exists comes first."""
MARKS = ("state.json", "dataset_dict.json")
"""The files by which a directory of `save_to_disk` is known: of one data set, and of several splits."""


def is_saved(folder: Path) -> bool:
    """Returns whether a directory was written by `save_to_disk`."""
    return any((folder / name).is_file() for name in MARKS)


def saved_files(folder: Path, split: str) -> list[Path]:
    """Returns the Arrow files of a directory of `save_to_disk`. Raises: UserError when it has no such split."""
    datasets = needed("datasets", "data", f"{folder}, a saved data set,")
    with naming(folder, "Save the data set again, or leave it out."):
        found = datasets.load_from_disk(str(folder), keep_in_memory=False)
    if isinstance(found, dict) and split not in found:
        raise _no_split(str(folder), split, found)
    return _files_of(found[split] if isinstance(found, dict) else found)


def hub_files(name: str, subset: str, split: str) -> list[Path]:
    """Returns the Arrow files of a data set of the hub, after a download if needed.

    Raises: UserError when it cannot be found, or has no such subset or split.
    """
    datasets = needed("datasets", "data", f"data.files: {name!r}, a data set of the hub,")
    try:
        builder = datasets.load_dataset_builder(name, subset or None)
        builder.download_and_prepare()
        found = builder.as_dataset(in_memory=False)
    except Exception as error:  # of many kinds: no network, no such data set or subset, a script, damaged files
        raise UserError(
            f"data.files: {name!r} is neither a file or folder (relative to the run file), nor a data set that "
            f"could be read from the hub ({reason_of(error)}). Correct data.files or data.subset."
        ) from error
    if split not in found:
        raise _no_split(name, split, found)
    return _files_of(found[split])


def _files_of(data_set) -> list[Path]:
    return [Path(file["filename"]) for file in data_set.cache_files]


def _no_split(name: str, split: str, known: Iterable[str]) -> UserError:
    return UserError(f"data.split = {split!r}, but {name} has {', '.join(map(repr, known))}. Correct data.split.")
