"""What goes side by side, and one whole run that the tests of training share."""

from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.launched import train_by_command
from tests.runs import run_file


class ByFile(LoadScopeScheduling):
    """With `-n`: a file's tests share fixtures, and there is one cluster.

    Source: pytest-xdist's manual, pytest_xdist_make_scheduler. Its own groups are not seen by pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = Path(nodeid.split("::")[0])
        return "cluster" if file.name in ("test_launchers.py", "test_slurm.py") else str(file)


def pytest_xdist_make_scheduler(config: pytest.Config, log) -> ByFile:
    return ByFile(config, log)


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """The run file of a run of 8 steps on 2 ranks, uninterrupted."""
    run = run_file(tmp_path_factory.mktemp("whole"))
    train_by_command(run)
    return run
