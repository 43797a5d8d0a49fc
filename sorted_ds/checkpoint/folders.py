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
import shutil
from contextlib import suppress
from pathlib import Path

PUBLISHED = re.compile(r"step_\d{8,}")
WRITING, DELETING = ".writing_", ".deleting_"


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
    """Returns the hidden folder in which a checkpoint is written. No killed run has left one of this name."""
    return checkpoint.with_name(f"{WRITING}{checkpoint.name}_{process_id}")


def publish(hidden: Path, checkpoint: Path) -> None:
    """Renames the hidden folder. An earlier checkpoint of the same step is deleted only after that. Raises: OSError."""
    if not checkpoint.exists():
        hidden.rename(checkpoint)
        return
    earlier = checkpoint.with_name(f"{DELETING}{checkpoint.name}")
    checkpoint.rename(earlier)
    try:
        hidden.rename(checkpoint)
    except OSError:
        earlier.rename(checkpoint)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def delete(checkpoint: Path) -> None:
    """Hides the checkpoint, then deletes it, so that a kill leaves no half checkpoint. A failure only costs space."""
    hidden = checkpoint.with_name(f"{DELETING}{checkpoint.name}")
    with suppress(OSError):
        checkpoint.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def delete_leftovers(folder: Path) -> None:
    """Deletes the hidden folders that killed runs have left."""
    for leftover in (*folder.glob(f"{WRITING}*"), *folder.glob(f"{DELETING}*")):
        shutil.rmtree(leftover, ignore_errors=True)


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
