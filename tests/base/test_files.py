"""One run alone writes into a directory; a process that ends, however it does, gives its claim up."""

import subprocess
import sys
from unittest import mock

import pytest

from sorted_ds.base import files
from sorted_ds.base.errors import UserError
from sorted_ds.base.files import claim

HOLDER = """
import sys, time
from pathlib import Path
from sorted_ds.base.files import claim
held = claim(Path(sys.argv[1]))
print("claimed", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "claimed\n"
    yield process
    process.kill()


def test_a_directory_that_another_run_uses_is_told_with_its_process(holder, tmp_path):
    with (
        mock.patch.object(files, "SECONDS_FOR_THE_OTHER", 0.6),
        pytest.raises(UserError, match=rf"run is in use by another run \(process {holder.pid} on .*touch .*/run/stop"),
    ):
        claim(tmp_path / "run")


def test_a_killed_run_gives_it_up(holder, tmp_path):
    holder.kill()
    with claim(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").is_file()
    with claim(tmp_path / "run"):
        pass
