"""One whole run that the tests of training share."""

from pathlib import Path

import pytest

from tests.launched import train_by_command
from tests.runs import run_file


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """The run file of a run of 8 steps on 2 ranks, uninterrupted."""
    run = run_file(tmp_path_factory.mktemp("whole"))
    train_by_command(run)
    return run
