"""Which files run side by side, and one whole run that the tests of training share."""

import os
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

from sorted_ds.cluster.extensions import is_held_here
from tests import tiers
from tests.chats import train_base
from tests.launched import ROOT, SAID, train_by_command
from tests.runs import run_file

CLUSTER_FILES = ("test_launchers.py", "test_slurm.py")
"""They share one cluster, so they run in one process."""


class ByFile(LoadScopeScheduling):
    """With `-n`: the tests of a file share fixtures, so a file runs in one process.

    Source: pytest-xdist's manual, pytest_xdist_make_scheduler. pytest 9.2 does not see the groups of xdist itself.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = Path(nodeid.split("::")[0])
        return "cluster" if file.name in CLUSTER_FILES else str(file)


def pytest_xdist_make_scheduler(config: pytest.Config, log) -> ByFile:
    return ByFile(config, log)


def pytest_configure(config: pytest.Config) -> None:
    """Gives each process one thread. Ranks and workers with more wait for each other's threads, many times as long."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    tiers.pytest_configure(config)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Removes locks that killed tests left on compiled operations: whoever needs the operation would wait for ever."""
    if not hasattr(session.config, "workerinput"):
        for lock in (ROOT / ".cache" / "torch_extensions").glob("**/lock"):
            if not is_held_here(lock):
                lock.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def chat_base(tmp_path_factory) -> Path:
    """Returns the folder of a tokenizer without a chat template."""
    return train_base(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """Returns the run file of a run of 8 steps on 2 ranks that was not interrupted."""
    run = run_file(tmp_path_factory.mktemp("whole"))
    (run.parent / SAID).write_text(train_by_command(run))
    return run
