"""Writes files so that none is half written, and gives one run a directory for itself.

In: paths. On disk: files and folders that appear complete under their name or not at all, and that everyone can read
who can read their folder; and `.lock` in a directory that a run has claimed.
"""

import errno
import fcntl
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from sorted_ds.base.errors import UserError

UNFINISHED, REPLACED = ".writing_", ".deleting_"
"""Prefixes of hidden names: what is being written, and an old folder whose replacement has come."""
READ_AND_WRITE = 0o666
SECONDS_FOR_THE_OTHER = 120.0
"""How long a killed run may take to end all of its processes, and NFS to forget the locks of a lost host."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


@contextmanager
def replaced(path: Path, *, durable: bool = False, overwrite: bool = True) -> Iterator[Path]:
    """Yields a hidden path beside `path`. What the block writes there, a file or a folder, then becomes `path`.

    When the block raises, the hidden path is removed and `path` stays as it was. The parent folder is made. The hidden
    name holds the process number, so several processes may write the same file at once: the last one wins.

    With `durable`, the contents are synced to the disk before the name appears, and the name itself when the block
    has ended. With `overwrite`, an existing file is replaced atomically; an existing folder is moved aside first,
    and moved back if the new one cannot take its place.

    Raises: FileExistsError when `path` exists and `overwrite` is false; OSError when the file system refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f"{UNFINISHED}{path.name}_{os.getpid()}")
    remove(hidden)  # a killed process with the same number may have left it
    try:
        yield hidden
        if durable:
            for part in (*hidden.rglob("*"), hidden):
                sync(part)
        if overwrite:
            move_over(hidden, path)
        else:
            _move_to_free(hidden, path)
        if durable:
            sync(path.parent)
    finally:
        remove(hidden)


def move_over(hidden: Path, path: Path) -> None:
    """Renames a hidden file or folder to `path`. An earlier one goes when the new one has come. Raises: OSError."""
    if not path.is_dir():
        hidden.replace(path)
        return
    aside = path.with_name(f"{REPLACED}{path.name}_{os.getpid()}")
    remove(aside)
    path.rename(aside)
    try:
        hidden.rename(path)
    except OSError:
        aside.rename(path)
        raise
    remove(aside)


def _move_to_free(hidden: Path, path: Path) -> None:
    taken = FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    if path.exists():
        raise taken
    try:
        hidden.rename(path)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):  # another process was faster
            raise taken from None
        raise


def remove_unfinished(folder: Path, name: str = "") -> None:
    """Removes what killed processes left half written or half deleted in a folder that no other process writes to.

    With `name`, only what was to become files and folders whose names start so.
    """
    for prefix in (UNFINISHED, REPLACED):
        for left in folder.glob(f"{prefix}{name}*"):
            remove(left)


def remove(path: Path) -> None:
    """Removes a file, or a folder with its contents, if it exists. What cannot be removed stays, without an error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def sync(path: Path) -> None:
    """Returns when the contents of a file, or the names in a folder, are on the disk, not only in its cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def share(path: Path) -> None:
    """Gives files the read and write permissions of their folder. `path`: one file, or the folder of several.

    safetensors 0.8.0 makes files that only their owner may read, whatever the umask says; the folder follows the umask.
    """
    for file in path.iterdir() if path.is_dir() else (path,):
        if file.is_file():
            file.chmod(file.parent.stat().st_mode & READ_AND_WRITE)


def claim(folder: Path) -> IO[str]:
    """Makes the folder and reserves it for this process until the returned file is closed or the process ends.

    Nothing is reserved where the file system has no locks. Raises: UserError when another process keeps the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, end, has_printed = (folder / ".lock").open("a+"), time.monotonic() + SECONDS_FOR_THE_OTHER, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > end:
                file.seek(0)
                raise UserError(
                    f"{folder} is in use by another run ({file.read().strip()}). Wait until that run has ended, stop "
                    f"it with `touch {shlex.quote(str(folder / 'stop'))}`, or set another run_dir."
                ) from None
            if not has_printed:
                has_printed = True
                print(f"waiting for another run to leave {folder}", file=sys.stderr, flush=True)
            time.sleep(0.5)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return file
            raise
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file
