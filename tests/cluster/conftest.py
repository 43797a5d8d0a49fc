"""One cluster for all of these tests. Where its programs are missing they are skipped; in CI they fail then."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.machines import Cluster, forbidden, missing
from tests.launched import ROOT

REQUIRED = "SORTED_DS_REQUIRE_CLUSTER"
"""Set by .ci/run."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if absent := missing():
        told = f"needs {', '.join(absent)}: run tests/cluster/install.sh as root"
        if os.environ.get(REQUIRED):
            pytest.fail(told)
        pytest.skip(told)
    if told := forbidden():
        pytest.skip(f"this machine cannot hold hosts of its own: {told}")
    folder = ROOT / ".cache" / "cluster"
    with Cluster(folder) as running:
        yield running
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def place(request) -> Iterator[Path]:
    """A folder that all hosts see: each has its own /tmp."""
    if told := forbidden():
        pytest.skip(f"this machine cannot hold hosts of its own: {told}")
    folder = Path(tempfile.mkdtemp(prefix="place-", dir=ROOT / ".cache"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
