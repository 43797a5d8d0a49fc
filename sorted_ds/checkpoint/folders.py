"""The folders of checkpoints: their names, and how one appears and disappears as a whole.

    RUN_DIR/checkpoints/
        step_00000200/              a published checkpoint
        damaged_step_00000100/      one that was found damaged; a user may look at it or delete it
        .writing_step_00000300_77/  one that process 77 writes
        .deleting_step_00000000/    one that is being deleted

In: the folder of checkpoints. Out: the published ones. Folders change by renaming alone, so none is seen half.
"""

import os
import re
from contextlib import suppress
from pathlib import Path

from sorted_ds.base.files import REPLACED, UNFINISHED, remove

PUBLISHED = re.compile(r"step_\d{8,}")


def checkpoint_name(step: int) -> str:
    """Returns the name of the folder of a step's checkpoint."""
    return f"step_{step:08d}"


def published_checkpoints(folder: Path) -> list[Path]:
    """Returns the published checkpoints, oldest first; none if there is no folder.

    Raises: OSError when the folder cannot be read.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return [folder / name for name in sorted(names) if PUBLISHED.fullmatch(name)]


def writing_folder(checkpoint: Path, process_id: str) -> Path:
    """Returns the hidden folder in which a checkpoint is written. Folders of killed runs have other process numbers."""
    return checkpoint.with_name(f"{UNFINISHED}{checkpoint.name}_{process_id}")


def delete(checkpoint: Path) -> None:
    """Hides the checkpoint, then deletes it, so that a kill leaves no half checkpoint. A failure only costs space."""
    hidden = checkpoint.with_name(f"{REPLACED}{checkpoint.name}")
    with suppress(OSError):
        checkpoint.rename(hidden)
        remove(hidden)


def rename_damaged(checkpoint: Path) -> Path:
    """Renames a checkpoint, so that it is neither restored nor counted again. Returns its new path. Raises: OSError."""
    path = unused = checkpoint.with_name(f"damaged_{checkpoint.name}")
    number = 2
    while unused.exists():
        unused, number = path.with_name(f"{path.name}-{number}"), number + 1
    checkpoint.rename(unused)
    return unused


def num_blocks(folder: Path) -> int:
    """Returns the number of disk blocks that the folder's files occupy; 0 if the folder cannot be read."""
    try:
        return sum(entry.stat().st_blocks for entry in os.scandir(folder))
    except OSError:
        return 0
