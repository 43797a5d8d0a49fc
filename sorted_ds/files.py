"""What a file system must be told so that nothing is lost."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """The contents of a file, or the names in a folder, are on the disk, not only in its cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
