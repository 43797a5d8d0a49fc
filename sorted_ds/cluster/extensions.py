"""Removes the locks that killed processes left on DeepSpeed's compiled operations.

In: the folder where torch compiles DeepSpeed's operations. Out: the same folder without locks that nobody holds. torch
takes a lock by making a file, which it keeps open, and waits for an existing lock silently and without end.
Source: torch 2.13.0, utils/file_baton.py and `_get_build_directory` of utils/cpp_extension.py.
"""

import os
import sys
import time
from pathlib import Path

import psutil
from torch.utils.cpp_extension import get_default_build_root

SECONDS_TO_COMPILE = 300.0
"""An operation takes one minute. An older lock that no process here has open belongs to a killed process."""


def remove_stale_locks(prints: bool) -> None:
    """Returns when no lock is left that is not held on this host. Waits for locks that another host may hold.

    `prints`: whether this rank tells the user that it waits.
    """
    has_printed = False
    while locks := [lock for lock in _build_root().glob("**/lock") if not is_held_here(lock)]:
        for lock in locks:
            if _age_seconds(lock) > SECONDS_TO_COMPILE:
                lock.unlink(missing_ok=True)
            elif prints and not has_printed:
                has_printed = True
                print(
                    f"waiting at most {SECONDS_TO_COMPILE:.0f} s for the lock {lock}: the process that made it was "
                    "killed or is on another host",
                    file=sys.stderr,
                )
        time.sleep(0.5)


def _build_root() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()).resolve()


def is_held_here(lock: Path) -> bool:
    """Whether a process of this host has the lock open, among those that this user may look at."""
    for process in psutil.process_iter():
        try:
            if any(Path(file.path) == lock for file in process.open_files()):
                return True
        except psutil.Error:
            continue
    return False


def _age_seconds(lock: Path) -> float:
    try:
        return time.time() - lock.stat().st_mtime
    except OSError:
        return 0.0
