"""What goes wrong in a run is one line, on all ranks, and leaves nothing half done."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from sorted_ds.base.errors import AgreedError
from sorted_ds.cluster.ranks import Ranks
from sorted_ds.cluster.stop import StopCauses
from sorted_ds.run.finish import save_last
from tests.forked import by_ranks
from tests.launched import (
    ROOT,
    SETTINGS,
    STEPS,
    by_launcher,
    copied,
    metrics,
    one_error,
    run_dir,
    train,
    train_by_command,
)
from tests.runs import run_file


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(whole, tmp_path):
    run = copied(whole, tmp_path, keep_steps=4)
    said = train(run, "optim.learning_rate=1e30", "optim.clip_norm=0", code=2)
    error = one_error(said)
    assert "Nothing was saved. Last good checkpoint: " in error
    assert error.endswith("step_00000004. To go on from there without this step, set train.skip_steps = [5].")
    assert sorted(p.name for p in (run_dir(run) / "checkpoints").iterdir()) == ["step_00000004"]


def test_steps_that_are_skipped_change_no_weight_and_are_told(whole, tmp_path):
    run = copied(whole, tmp_path, keep_steps=4)
    said = train(run, "train.skip_steps=[7, 4, 5, 6]", "log.every_steps=2")
    assert "steps that are not trained: 4, 5, 6, 7" in said
    assert "step 6/8  skipped" in said
    before, after = (run_dir(run) / "checkpoints" / f"step_0000000{step}" for step in (4, 8))
    names = sorted(path.name for path in before.glob("rank_*.safetensors"))
    assert len(names) == 2
    for name in names:
        old, new = load_file(before / name), load_file(after / name)
        assert old.keys() == new.keys()
        assert all(torch.equal(old[key], new[key]) for key in old)
    assert json.loads((run_dir(run) / "run.json").read_text())["run"]["train"]["skip_steps"] == [7, 4, 5, 6]


def test_a_checkpoint_that_cannot_be_written_is_one_error_and_the_last_good_one_stays(whole, tmp_path):
    run = copied(whole, tmp_path, keep_steps=4)

    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    said = train_by_command(run, code=2, preexec_fn=little_room)
    assert "warning: step_00000008 could not be written: " in said
    assert "step 8: the checkpoint could not be written" in one_error(said)
    assert [p.name for p in (run_dir(run) / "checkpoints").iterdir()] == ["step_00000004"]


def test_a_file_that_ended_a_run_has_had_its_effect_though_the_last_save_failed(tmp_path):
    (tmp_path / "stop").touch()
    stop = StopCauses(tmp_path, "", is_first=True)
    parts = mock.Mock(stop=stop, ranks=Ranks(0, 1, 0, torch.device("cpu")))
    parts.checkpoints.last_step, parts.checkpoints.finish.side_effect = 0, AgreedError("the disk is full")
    assert stop.request(None).stops
    with pytest.raises(AgreedError, match="the disk is full"):
        save_last(parts, 3, requeues=False)
    assert not (tmp_path / "stop").exists()


SMALL_FILES = """
import resource, sys
from sorted_ds.cluster.stop import listen
from sorted_ds.nested import save_full
from sorted_ds.run import run_dir
from sorted_ds.run.train import main
save_full.__defaults__ = ("20KB",)
def save_with_little_room(*args):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        return save_full(*args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
run_dir.save_full = save_with_little_room
listen()
sys.exit(main(sys.argv[1:]))
"""
"""The first of many cannot be written, and the other ranks gather on."""


def test_a_model_that_cannot_be_written_is_one_error_and_is_written_by_the_next_start(whole, tmp_path):
    run = copied(whole, tmp_path, keep_steps=STEPS)
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    left_by_a_killed_start = run_dir(run) / ".writing_model_1"
    left_by_a_killed_start.mkdir()
    (tmp_path / "small_files.py").write_text(SMALL_FILES)
    _, said = by_ranks(tmp_path / "small_files.py", str(run), *SETTINGS)
    assert "model could not be written: " in one_error(said)
    assert not list(run_dir(run).glob("*model*"))
    train(run)
    assert (run_dir(run) / "model" / "sorted.json").is_file()


def test_another_runs_directory_and_a_missing_shard_are_named(whole, tmp_path):
    run = copied(whole, tmp_path, keep_steps=4)
    assert "belongs to another run: seed = 17 there, 18 here" in one_error(train(run, "seed=18", code=2))
    (run_dir(run) / "checkpoints" / "step_00000004" / "rank_0001.safetensors").unlink()
    told = one_error(train(run, code=2))
    assert "rank_0001.safetensors is missing, and no other checkpoint in " in told
    assert (run_dir(run) / "checkpoints" / "step_00000004").is_dir()


def test_a_truncated_token_file_is_named(whole, tmp_path):
    run = copied(whole, tmp_path, keep_steps=4)
    path = next((tmp_path / "cache").glob("*/train.bin"))
    path.write_bytes(path.read_bytes()[:-10])
    assert "train.bin" in one_error(train(run, code=2))


LYING = """
import os, sys
settings = []
if os.environ["RANK"] == "1":
    sys.path[:0] = [{path!r}]
    settings = {settings!r}
from sorted_ds.run.train import main
sys.exit(main([*sys.argv[1:], *settings]))
"""


def other_code(folder: Path) -> None:
    shutil.copytree(ROOT / "sorted_ds", folder / "sorted_ds")
    with (folder / "sorted_ds" / "space" / "sampling.py").open("a") as file:
        file.write("# Another version.\n")


def other_torch(folder: Path) -> None:
    (folder / "torch-0.1.dist-info").mkdir(parents=True)
    (folder / "torch-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 0.1\n")


OTHER_STRATEGY = 'rank 1 has sampling.strategy = "uniform", rank 0 has "stratified"'


@pytest.mark.parametrize(
    ("stage", "prepare", "settings", "told"),
    [
        (2, Path.mkdir, ["sampling.strategy=uniform"], OTHER_STRATEGY),
        pytest.param(3, Path.mkdir, ["sampling.strategy=uniform"], OTHER_STRATEGY, marks=pytest.mark.long),
        (2, other_code, [], "rank 1 has code = "),
        pytest.param(3, other_torch, [], "rank 1 has torch = 0.1, rank 0 has ", marks=pytest.mark.long),
    ],
    ids=["run file, stage 2", "run file, stage 3", "code", "versions"],
)
def test_ranks_that_disagree_are_one_error_before_anything_is_trained(whole, tmp_path, stage, prepare, settings, told):
    run = copied(whole, tmp_path, keep_steps=0)
    prepare(tmp_path / "other")
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    (tmp_path / "lying.py").write_text(LYING.format(path=str(tmp_path / "other"), settings=settings))
    start = time.perf_counter()
    done = by_launcher("torchrun", str(tmp_path / "lying.py"), str(run), *SETTINGS)
    assert time.perf_counter() - start < 120  # a hang would last for minutes
    assert done.returncode != 0
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert told in error
    assert not list((run_dir(run) / "checkpoints").iterdir())


LYING_LATER = """
import os, sys
from sorted_ds.space import Pass, Planned, Sampler
from sorted_ds.run.train import main
plan = Sampler.plan
def lie(self, step):
    honest = plan(self, step)
    return honest[:-1] + [Planned(Pass(self.subnets[0]), honest[-1].share)] if step == 3 else honest
if os.environ["RANK"] == "1":
    Sampler.plan = lie
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.long), 3])
def test_ranks_that_run_other_passes_at_a_later_step_are_one_error_within_seconds(whole, tmp_path, stage):
    run = copied(whole, tmp_path, keep_steps=0)
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    (tmp_path / "lying.py").write_text(LYING_LATER)
    codes, said = by_ranks(tmp_path / "lying.py", str(run), *SETTINGS)
    last_row = (run_dir(run) / "metrics.jsonl").stat().st_mtime
    assert time.time() - last_row < 30  # with the ranks' end; what waits for another rank waits for minutes
    assert codes == [2, 2]
    assert "ranks disagree: step 3 runs " in one_error(said)
    assert [row["step"] for row in metrics(run) if "loss/training" in row] == [1, 2, 3]


def test_a_run_shorter_than_its_checkpoint_is_refused(whole, tmp_path):
    run = copied(whole, tmp_path, keep_steps=STEPS)
    assert "train.steps = 5, but" in one_error(train(run, "train.steps=5", code=2))


def test_a_rank_alone_is_told_to_prepare_first(tmp_path):
    run = run_file(tmp_path)
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "launch/train.py", str(run)], cwd=ROOT, capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 2
    assert "Run `sorted-ds prepare" in one_error(done.stderr)
