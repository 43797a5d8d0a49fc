"""What a file system must be told so that nothing is lost, and so that others may read it."""

import os
from pathlib import Path

READ_AND_WRITE = 0o666


def sync(path: Path) -> None:
    """The contents of a file, or the names in a folder, are on the disk, not only in its cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def share(path: Path) -> None:
    """A file, or those of a folder, with whoever may read the folder, which the umask decided.

    safetensors 0.8.0 makes files that only their owner may read, whatever the umask.
    """
    for file in path.iterdir() if path.is_dir() else (path,):
        if file.is_file():
            file.chmod(file.parent.stat().st_mode & READ_AND_WRITE)
