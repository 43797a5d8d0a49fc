"""Locks on compiled operations that a killed process has left: whoever comes next would wait for them for ever.

In: the folder where torch compiles DeepSpeed's operations. Out: the same folder, without locks that nobody holds. torch
takes a lock by making a file, which it keeps open, and waits for it without a word or an end. Source: torch 2.13.0,
utils/file_baton.py and `_get_build_directory` of utils/cpp_extension.py.
"""

import os
import sys
import time
from pathlib import Path

import psutil
from torch.utils.cpp_extension import get_default_build_root

SECONDS_TO_COMPILE = 300.0
"""An operation takes one minute. A lock that is older, and not open in any process here, is of one that was killed."""


def release_dead_locks(tells: bool) -> None:
    """Waits for locks that another host may hold. `tells`: whether to say so."""
    told = False
    while locks := [lock for lock in _root().glob("**/lock") if not _is_held(lock)]:
        for lock in locks:
            if _age(lock) > SECONDS_TO_COMPILE:
                lock.unlink(missing_ok=True)
            elif tells and not told:
                told = True
                print(
                    f"waiting for {lock}, at most {SECONDS_TO_COMPILE:.0f} s: the process that compiles there was "
                    "killed, or is on another host",
                    file=sys.stderr,
                )
        time.sleep(0.5)


def _root() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()).resolve()


def _is_held(lock: Path) -> bool:
    """By a process of this host that may be looked at."""
    for process in psutil.process_iter():
        try:
            if any(Path(file.path) == lock for file in process.open_files()):
                return True
        except psutil.Error:
            continue
    return False


def _age(lock: Path) -> float:
    try:
        return time.time() - lock.stat().st_mtime
    except OSError:
        return 0.0
