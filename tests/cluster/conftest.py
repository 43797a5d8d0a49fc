"""One cluster for all tests of this folder. Without its programs these tests are skipped; in CI they fail."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests.cluster.machines import Cluster, missing_programs, refusal_of_hosts
from tests.launched import ROOT

REQUIRED = "SORTED_DS_REQUIRE_CLUSTER"
""".ci/run sets this variable."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Yields a running cluster of two hosts with Slurm."""
    if programs := missing_programs():
        end_test(f"needs {', '.join(programs)}: run tests/cluster/install.sh as root")
    skip_without_hosts()
    folder = ROOT / ".cache" / "cluster"
    with Cluster(folder) as running:
        yield running
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """Yields a folder that all hosts see, which is not in /tmp, because each host has its own."""
    skip_without_hosts()
    folder = Path(tempfile.mkdtemp(prefix="shared-", dir=ROOT / ".cache"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def skip_without_hosts() -> None:
    """Skips the test on a machine that lets nobody create hosts. In CI the test fails."""
    if refusal := refusal_of_hosts():
        end_test(f"this machine cannot create hosts: {refusal}")


def end_test(message: str) -> NoReturn:
    """Skips the test, or fails it where .ci/run requires the cluster."""
    if os.environ.get(REQUIRED):
        pytest.fail(message)
    pytest.skip(message)
