"""A file or folder is replaced as a whole or not at all, and one run alone writes into a directory."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from sorted_ds.base import files
from sorted_ds.base.errors import UserError
from sorted_ds.base.files import claim, remove_unfinished, replaced

HOLDER = """
import sys, time
from pathlib import Path
from sorted_ds.base.files import claim
held = claim(Path(sys.argv[1]))
print("claimed", flush=True)
time.sleep(600)
"""


def write_folder(path: Path, text: str) -> None:
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "file").write_text(text)


def contents(folder: Path) -> dict[str, str]:
    """The texts of all files below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_appears_under_its_name_when_the_block_has_ended(tmp_path, durable):
    path = tmp_path / "made" / "file"
    with replaced(path, durable=durable) as hidden:
        assert hidden.parent == path.parent
        assert hidden.name.startswith(".writing_file")
        hidden.write_text("new")
        assert not path.exists()
    with replaced(path, durable=durable) as hidden:
        hidden.write_text("newer")
        assert path.read_text() == "new"
    assert contents(tmp_path) == {"made/file": "newer"}


@pytest.mark.parametrize("durable", [False, True])
def test_a_folder_takes_the_place_of_the_one_before(tmp_path, durable):
    for text in ("old", "new"):
        with replaced(tmp_path / "folder", durable=durable) as hidden:
            write_folder(hidden, text)
    assert contents(tmp_path) == {"folder/inner/file": "new"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_everything_as_it_was(tmp_path, error):
    def write_half(path: Path) -> None:
        with replaced(path) as hidden:
            write_folder(hidden, "half")
            raise error

    write_folder(tmp_path / "folder", "old")
    with pytest.raises(error):
        write_half(tmp_path / "folder")
    assert contents(tmp_path) == {"folder/inner/file": "old"}


def test_a_block_that_writes_nothing_is_an_error_and_keeps_the_folder_before(tmp_path):
    write_folder(tmp_path / "folder", "old")
    with pytest.raises(FileNotFoundError), replaced(tmp_path / "folder"):
        pass
    assert contents(tmp_path) == {"folder/inner/file": "old"}


@pytest.mark.parametrize("is_seen", [True, False])
def test_without_overwrite_what_another_process_wrote_meanwhile_is_kept(tmp_path, is_seen):
    """`is_seen` is false when the other process is faster after this one has looked."""

    def write_too_late(path: Path) -> None:
        with replaced(path, overwrite=False) as hidden:
            write_folder(hidden, "new")
            write_folder(path, "old")

    with mock.patch.object(Path, "exists", return_value=is_seen), pytest.raises(FileExistsError, match="folder"):
        write_too_late(tmp_path / "folder")
    assert contents(tmp_path) == {"folder/inner/file": "old"}


def test_without_overwrite_a_free_name_is_taken(tmp_path):
    with replaced(tmp_path / "folder", overwrite=False) as hidden:
        write_folder(hidden, "new")
    assert contents(tmp_path) == {"folder/inner/file": "new"}


def test_two_processes_that_write_the_same_path_do_not_meet(tmp_path):
    with replaced(tmp_path / "file") as first, mock.patch.object(os, "getpid", return_value=1):
        first.write_text("first")
        with replaced(tmp_path / "file") as second:
            second.write_text("second")
        assert (tmp_path / "file").read_text() == "second"
    assert contents(tmp_path) == {"file": "first"}


def test_what_killed_processes_left_is_removed(tmp_path):
    write_folder(tmp_path / ".writing_folder_1", "half")
    write_folder(tmp_path / ".deleting_folder_1", "half")
    (tmp_path / ".writing_file_1").write_text("half")
    (tmp_path / f".writing_file_{os.getpid()}").mkdir()
    with replaced(tmp_path / "file") as hidden:
        hidden.write_text("whole")
    remove_unfinished(tmp_path)
    assert contents(tmp_path) == {"file": "whole"}


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "claimed\n"
    yield process
    process.kill()


def test_the_error_for_a_directory_in_use_names_the_process_that_uses_it(holder, tmp_path):
    with (
        mock.patch.object(files, "SECONDS_FOR_THE_OTHER", 0.6),
        pytest.raises(UserError, match=rf"run is in use by another run \(process {holder.pid} on .*touch .*/run/stop"),
    ):
        claim(tmp_path / "run")


def test_a_killed_run_no_longer_claims_its_directory(holder, tmp_path):
    holder.kill()
    with claim(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").is_file()
    with claim(tmp_path / "run"):
        pass
