"""Checkpoints that are damaged, cannot be written or belong to another run are reported, renamed or refused."""

import os
import resource
import shutil
import threading
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch

from sorted_ds.base.errors import UserError
from sorted_ds.checkpoint import index, read_master_weights
from sorted_ds.checkpoint.background import Staging
from sorted_ds.checkpoint.index import INDEX
from tests import resumed
from tests.resumed import Leg, Trainer
from tests.spawn import on_ranks


def two_checkpoints(ranks, folder: str, weights: str) -> None:
    """Saves checkpoints at steps 5 and 10, and the engine's weights at step 10 in the file `weights`."""
    resumed.train(ranks, Leg(), folder, 0, 5)
    found = resumed.train(ranks, Leg(), folder, 5, 10)
    if ranks.is_first:
        torch.save(found["weights"], weights)


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    on_ranks(2, two_checkpoints, str(folder / "run"), str(folder / "weights.pt"), folder=folder / "ranks")
    return folder


@pytest.fixture
def saved(originals, tmp_path) -> Path:
    """Returns a folder with checkpoints of steps 5 and 10."""
    return Path(shutil.copytree(originals / "run", tmp_path / "run"))


def restore_message(ranks, folder: Path | str, **settings) -> str:
    """Returns the restored step and the warnings, or the error."""
    trainer = Trainer(ranks, Leg(), str(folder), **settings)
    try:
        step = trainer.checkpoints.restore_latest(trainer.engine)
    except UserError as error:
        return str(error)
    return "\n".join([f"step {step}", *trainer.checkpoints.warnings])


def restore_damaged(ranks, saved: str, folder: str, damages: dict, **settings) -> dict[str, tuple[str, list[str]]]:
    """Returns for each damage to a copy of the checkpoints the restore's message, and the names left in the folder."""
    found = {}
    for name, damage in damages.items():
        run = Path(folder) / name
        with ranks.fail_together():
            if ranks.is_first:
                shutil.copytree(saved, run)
                damage(run)
        with mock.patch.object(index, "SECONDS_TO_APPEAR", 0.2):
            message = restore_message(ranks, run, **settings)
        found[name] = (message, sorted(path.name for path in run.iterdir()))
    return found


SHARD = "step_00000010/rank_0001.safetensors"


def truncate(run: Path) -> None:
    os.truncate(run / SHARD, (run / SHARD).stat().st_size - 8)


def flip_a_bit(run: Path) -> None:
    content = bytearray((run / SHARD).read_bytes())
    content[-1] ^= 1
    (run / SHARD).write_bytes(content)


def lose_a_shard(run: Path) -> None:
    (run / SHARD).unlink()


def cut_the_index(run: Path) -> None:
    path = run / "step_00000010" / INDEX
    path.write_text(path.read_text()[:-20])


def lose_the_index(run: Path) -> None:
    (run / "step_00000010" / INDEX).unlink()


def lose_both(run: Path) -> None:
    lose_the_index(run)
    (run / "step_00000005" / INDEX).unlink()


def other_format(run: Path) -> None:
    path = run / "step_00000010" / INDEX
    path.write_text(path.read_text().replace('"format": 2', '"format": 99'))


def change_the_step(run: Path) -> None:
    """Changes one digit; the file is still valid JSON."""
    path = run / "step_00000010" / INDEX
    path.write_text(path.read_text().replace('"step": 10', '"step": 18'))


def rename_it(run: Path) -> None:
    (run / "step_00000010").rename(run / "step_00000018")


def add_a_backup(run: Path) -> None:
    """Adds a damaged folder that has not the name of a checkpoint."""
    shutil.copytree(run / "step_00000010", run / "step_00000099.bak")
    (run / "step_00000099.bak" / INDEX).unlink()


def nothing(run: Path) -> None:
    """Does no damage."""


DAMAGES = {
    truncate: "rank_0001.safetensors has ",
    flip_a_bit: "rank_0001.safetensors has changed since it was written",
    lose_a_shard: "rank_0001.safetensors is missing",
    cut_the_index: "checkpoint.json is damaged",
    lose_the_index: "has no checkpoint.json",
    change_the_step: "checkpoint.json has changed since it was written",
}


def test_a_damaged_checkpoint_is_reported_and_renamed_and_the_one_before_it_is_restored(saved, tmp_path):
    damages = {damage.__name__: damage for damage in DAMAGES}
    found = on_ranks(2, restore_damaged, str(saved), str(tmp_path / "runs"), damages, folder=tmp_path / "ranks")
    for damage, reason in DAMAGES.items():
        message, names = found[damage.__name__]
        step, warning = message.splitlines()
        assert step == "step 5"
        assert reason in warning
        assert warning.endswith("Resuming from step_00000005; the damaged checkpoint is now damaged_step_00000010")
        assert names == ["damaged_step_00000010", "step_00000005"]


def refusals(ranks, saved: str, folder: str) -> dict[str, str]:
    """Returns the message for everything that is refused, by name."""
    strict = restore_damaged(ranks, saved, f"{folder}/strict", {"truncate": truncate, "nothing": nothing}, strict=True)
    others = {"lose_both": lose_both, "other_format": other_format, "rename_it": rename_it, "a_backup": add_a_backup}
    found = restore_damaged(ranks, saved, folder, others)
    found["other_run"] = (restore_message(ranks, saved, facts={"seed": "2"}), [])
    return {name: message for name, (message, _) in {**found, "strict": strict["truncate"], **strict}.items()}


def test_a_start_refuses_foreign_checkpoints_and_damage_that_it_cannot_avoid(saved, tmp_path):
    found = on_ranks(2, refusals, str(saved), str(tmp_path / "runs"), folder=tmp_path / "ranks")
    assert found["nothing"] == "step 10"
    assert "Delete step_00000010 to resume from the one before it, or remove checkpoint.strict" in found["strict"]
    assert "has no checkpoint.json, and no other checkpoint in " in found["lose_both"]
    assert "has format 99, but this version reads format 2" in found["other_format"]
    assert "another run: seed = 1 there, 2 here" in found["other_run"]
    assert "belongs to step 10, not to step_00000018" in found["rename_it"]
    assert found["a_backup"] == "step 10"


def fall_back_and_keep_one(ranks, folder: str) -> list[str]:
    """Damages the newer of two checkpoints, restores the older one, and saves two more, of which one is kept."""
    with ranks.fail_together():
        if ranks.is_first:
            truncate(Path(folder))
    trainer = Trainer(ranks, Leg(), folder, keep_last=1)
    seen = [trainer.checkpoints.restore_latest(trainer.engine)]
    for step in (6, 7):
        trainer.checkpoints.save(trainer.engine, step)
        seen.append(" ".join(sorted(path.name for path in Path(folder).glob("step_*"))))
    return seen


def test_old_checkpoints_are_deleted_and_a_damaged_one_does_not_count_as_kept(saved, tmp_path):
    seen = on_ranks(2, fall_back_and_keep_one, str(saved), folder=tmp_path / "ranks")
    assert seen == [5, "step_00000006", "step_00000007"]


def look_into_different_folders(ranks, folders: list[str], late: str) -> list[str]:
    """Gives each rank a folder of its own, then a folder that rank 1 sees two seconds late. Returns the messages."""
    with mock.patch.object(index, "SECONDS_TO_APPEAR", 1.0):
        found = [restore_message(ranks, folders[ranks.rank])]
        trainer = Trainer(ranks, Leg(), folders[ranks.rank] + "/new")
        found.append(trainer.checkpoints.start_save(trainer.engine, 1) or trainer.checkpoints.finish()[0].error)
    view = Path(late)
    if ranks.rank == 1:
        view = Path(late + "_by_rank_1")
        threading.Timer(2.0, lambda: view.symlink_to(late)).start()
    trainer = Trainer(ranks, Leg(), str(view))
    trainer.checkpoints.save(trainer.engine, 1)
    return [*found, restore_message(ranks, view)]


def test_ranks_that_see_different_folders_raise_and_a_slow_file_system_is_waited_for(saved, tmp_path):
    folders, late = [str(saved), str(tmp_path / "absent")], str(tmp_path / "late")
    different, invisible, late = on_ranks(2, look_into_different_folders, folders, late, folder=tmp_path / "ranks")
    assert "rank 1 sees the checkpoints none, rank 0 sees step_00000005 step_00000010" in different
    assert "rank_0001.safetensors" in invisible
    assert late == "step 1"


def save_with_little_room(ranks, folder: str) -> list:
    """Returns how saves end while rank 1 can at times write no file over 1,000 bytes, as on a full disk."""

    def limit_file_size(num_bytes: int) -> None:
        if ranks.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))

    def try_to(save) -> str:
        try:
            return " ".join(result.error for result in save())
        except UserError as error:
            return f"raised: {error}"

    trainer = Trainer(ranks, Leg(), folder)
    checkpoints, engine = trainer.checkpoints, trainer.engine
    checkpoints.restore_latest(engine)
    found = []
    limit_file_size(1000)
    checkpoints.start_save(engine, 11)
    found.append(try_to(checkpoints.finish))  # the first failure is reported
    limit_file_size(-1)
    checkpoints.start_save(engine, 12)
    found.append(try_to(checkpoints.finish))
    limit_file_size(1000)
    checkpoints.start_save(engine, 13)
    found.append(try_to(lambda: checkpoints.start_save(engine, 14)))
    found.append(try_to(checkpoints.finish))  # the second failure in a row ends the run
    found.append(try_to(lambda: checkpoints.save(engine, 15)))
    limit_file_size(-1)
    names = sorted(path.name for path in Path(folder).iterdir())
    checkpoints.folder = Path(folder) / "step_00000012" / INDEX  # no folder can be made in a file
    found.append(try_to(lambda: checkpoints.save(engine, 16)))
    checkpoints.folder, checkpoints._staging = Path(folder), Staging()
    full = mock.patch("sorted_ds.checkpoint.background.torch", **{"empty.side_effect": RuntimeError("not enough")})
    with full if ranks.rank == 1 else nullcontext():
        found.append(try_to(lambda: checkpoints.save(engine, 17)))
    return [*found, names]


def test_one_failed_save_is_reported_and_two_in_a_row_end_the_run(saved, tmp_path):
    found = on_ranks(2, save_with_little_room, str(saved), folder=tmp_path / "full")
    once, fine, again, twice, last, in_a_file, no_memory, names = found
    assert once.startswith("rank 1: rank_0001.safetensors")
    assert fine == ""
    assert again.startswith("rank 1: rank_0001.safetensors")
    assert twice.startswith("raised: step 14: the checkpoint could not be written: rank 1: rank_0001.safetensors")
    assert twice.endswith(f"Last good checkpoint: {saved / 'step_00000012'}.")
    assert last.startswith("raised: step 15: ")
    assert "step 16: the checkpoint could not be written: rank 0: [Errno 20] Not a directory" in in_a_file
    assert "step 17: the checkpoint could not be written: rank 1: no host memory for a copy of " in no_memory
    assert names == ["step_00000010", "step_00000012"]


def test_the_master_weights_of_a_checkpoint_can_be_read_without_an_engine(originals):
    weights = read_master_weights(originals / "run" / "step_00000010")
    expected = torch.load(originals / "weights.pt")
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        rows_first = expected[name].t() if name.endswith(("o_proj.weight", "down_proj.weight")) else expected[name]
        assert torch.equal(value, rows_first.flatten()), name
