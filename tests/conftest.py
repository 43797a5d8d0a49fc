"""What goes side by side, and one whole run that the tests of training share."""

from pathlib import Path

import pytest

from tests.launched import train_by_command
from tests.runs import run_file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `--dist loadgroup`: a file's tests share fixtures, and there is one cluster."""
    for item in items:
        group = "cluster" if "cluster" in item.path.parts else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """The run file of a run of 8 steps on 2 ranks, uninterrupted."""
    run = run_file(tmp_path_factory.mktemp("whole"))
    train_by_command(run)
    return run
