"""A lock that a killed process left on a compiled operation is removed; one that is held, or may be, is not."""

import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from torch.utils.file_baton import FileBaton

from sorted_ds.cluster import extensions
from sorted_ds.cluster.extensions import release_dead_locks

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


def test_a_lock_that_a_process_holds_stays_however_old_it_is(lock, holder):
    os.utime(lock, (0, 0))
    release_dead_locks(tells=False)
    assert lock.exists()


def test_a_killed_process_s_lock_goes_when_nobody_can_be_compiling(lock, holder, capsys):
    holder.kill()
    holder.wait()
    with mock.patch.object(extensions, "SECONDS_TO_COMPILE", 1.5):
        began = time.monotonic()
        release_dead_locks(tells=True)
    assert time.monotonic() - began > 1
    assert f"waiting for {lock}, at most" in capsys.readouterr().err
    assert FileBaton(str(lock)).try_acquire()
