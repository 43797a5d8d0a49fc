"""A lock that a killed process left on a compiled operation is removed; a lock that may be held is kept."""

import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from torch.utils.file_baton import FileBaton

from sorted_ds.cluster import extensions
from sorted_ds.cluster.extensions import remove_stale_locks

HOLDER = """
import sys, time
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
print(baton.try_acquire(), flush=True)
time.sleep(600)
"""


@pytest.fixture
def lock(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "an_operation").mkdir()
    return tmp_path / "an_operation" / "lock"


@pytest.fixture
def holder(lock):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    yield process
    process.kill()
    process.wait()


def test_a_lock_that_a_process_holds_is_kept_at_any_age(lock, holder):
    os.utime(lock, (0, 0))
    remove_stale_locks(prints=False)
    assert lock.exists()


def test_a_lock_of_a_killed_process_is_removed_when_nobody_can_be_compiling(lock, holder, capsys):
    holder.kill()
    holder.wait()
    with mock.patch.object(extensions, "SECONDS_TO_COMPILE", 1.5):
        began = time.monotonic()
        remove_stale_locks(prints=True)
    assert time.monotonic() - began > 1
    assert f"waiting at most 2 s for the lock {lock}: " in capsys.readouterr().err
    assert FileBaton(str(lock)).try_acquire()
