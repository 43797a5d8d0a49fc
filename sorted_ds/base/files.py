"""What a file system must be told so that nothing is lost, others may read it, and one run alone writes."""

import errno
import fcntl
import os
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import IO

from sorted_ds.base.errors import UserError

READ_AND_WRITE = 0o666
SECONDS_FOR_THE_OTHER = 120.0
"""How long a run that was killed may take to end all of its processes, and NFS to forget a host that is gone."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


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


def claim(folder: Path) -> IO[str]:
    """Makes the folder and claims it for this process, for as long as the result is open. A kill ends it too.

    Where the file system knows no locks nothing is claimed. Raises: UserError when another process keeps it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, end, told = (folder / ".lock").open("a+"), time.monotonic() + SECONDS_FOR_THE_OTHER, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > end:
                file.seek(0)
                raise UserError(
                    f"{folder} is in use by another run ({file.read().strip()}). Wait until it has ended, end it with "
                    f"`touch {shlex.quote(str(folder / 'stop'))}`, or set another run_dir."
                ) from None
            if not told:
                told = True
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
