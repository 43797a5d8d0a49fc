"""A run that is interrupted, killed, moved or continued gives what the uninterrupted one gives.

Bit-equal on the same number of ranks, equal to rounding on another.
"""

import json
import shutil
import signal
import subprocess
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from sorted_ds.cluster.launcher import rank_processes
from sorted_ds.commands.cli import main
from sorted_ds.run.monitor import FULL_LOSS
from tests.forked import by_ranks
from tests.launched import (
    ROOT,
    SETTINGS,
    STAYING,
    STEPS,
    by_launcher,
    command,
    copied,
    hears_all,
    masters,
    metrics,
    one_error,
    run_dir,
    train,
)


def test_an_interrupted_run_ends_bit_equal(whole, tmp_path):
    run = copied(whole, tmp_path, keep_steps=4)
    assert "resuming from the checkpoint of step 4" in train(run)
    before, after = masters(whole), masters(run)
    assert all(torch.equal(before[name], after[name]) for name in before)
    exported = [load_file(run_dir(r) / "model" / "model.safetensors") for r in (whole, run)]
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])
    lines = [[without_speeds(row) for row in metrics(r)] for r in (whole, run)]
    lines = [[row for row in rows if len(row) > 1] for rows in lines]
    assert lines[0] == lines[1]


def without_speeds(row: dict) -> dict:
    return {key: value for key, value in row.items() if not key.startswith("speed/")}


@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=pytest.mark.long)])
def test_another_number_of_ranks_ends_equal_to_rounding(whole, tmp_path, ranks):
    run = copied(whole, tmp_path, keep_steps=4)
    train(run, ranks=ranks)
    before, after = masters(whole), masters(run)
    assert max(float((before[name] - after[name]).abs().max()) for name in before) <= 5e-5


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_signal_ends_the_step_and_saves_and_the_run_goes_on_bit_equal(whole, tmp_path, number):
    run = copied(whole, tmp_path, keep_steps=0)
    process = subprocess.Popen(command(run), cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=hears_all)
    for line in process.stderr:
        if line.startswith("step 2/"):
            process.send_signal(number)
            break
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    assert "start the run again to resume" in said
    saved = sorted(path.name for path in (run_dir(run) / "checkpoints").iterdir())
    assert f"saved {saved[-1]}" in said
    train(run)
    before, after = masters(whole), masters(run)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_finished_run_trains_no_more_and_a_longer_one_goes_on(whole, tmp_path):
    run = copied(whole, tmp_path, keep_steps=STEPS)
    said = train(run, "train.steps=9")
    assert "changed since the last start: train.steps: 8 before, 9 now" in said
    assert "step 9/9" in said
    assert "step 8/9" not in said


LEAVING = """
import sys
from sorted_ds.run import evaluation, train
from sorted_ds.cluster.stop import listen
evaluate, times, last = evaluation.evaluate_subnets, [], int(sys.argv.pop(1))
def leave_after(*args, **kwargs):
    times.append(len(args[1]))
    if len(times) == last:
        (train.load_run(train.Path(sys.argv[1])).run_dir / "stop").touch()
    return evaluate(*args, **kwargs)
evaluation.evaluate_subnets = leave_after
listen()
code = train.main(sys.argv[1:])
sys.stdout.write(f"evaluated {times}\\n")
sys.exit(code)
"""


@pytest.mark.long
def test_a_run_that_is_to_end_in_its_last_evaluation_goes_on_with_it(whole, tmp_path):
    run = copied(whole, tmp_path, keep_steps=STEPS)
    model, table = run_dir(run) / "model", run_dir(run) / "subnets.json"
    before = table.read_bytes()
    table.unlink()
    (tmp_path / "leaving.py").write_text(LEAVING)
    codes, said = by_ranks(tmp_path / "leaving.py", "3", str(run), *SETTINGS)
    assert codes == [0, 0], said
    assert "but its table is not complete: the file stop; start the run again to resume" in said
    assert len(json.loads(table.read_text())["subnets"]) == 3
    written = (model / "model.safetensors").stat().st_mtime_ns
    (run_dir(run) / "pareto.png").unlink()
    _, said = by_ranks(tmp_path / "leaving.py", "99", str(run), *SETTINGS)
    assert said.count("evaluated [1, 1, 1, 1, 1]") == 2  # the other five of eight, on both ranks
    assert table.read_bytes() == before
    for gone in (table, run_dir(run) / "pareto.png"):
        gone.unlink()
    curves = run_dir(run) / "metrics.jsonl"
    rows, last = [row for row in metrics(run) if row["step"] < STEPS], metrics(run)[-1]
    curves.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (run_dir(run) / "stop").touch()
    assert "trained 8 steps; model, table and figure are in " in train(run)  # nothing is left to do
    assert table.read_bytes() == before
    assert (run_dir(run) / "pareto.png").is_file()
    again = metrics(run)[-1]
    assert again == {**last, "speed/validation_seconds": again["speed/validation_seconds"]}
    assert again["speed/validation_seconds"] < 0.1
    assert len(metrics(run)) == len(rows) + 1
    assert (model / "model.safetensors").stat().st_mtime_ns == written
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}))
    train(run)
    assert {weight.dtype for weight in load_file(model / "model.safetensors").values()} == {torch.bfloat16}


def test_a_run_that_is_to_end_in_an_evaluation_saves_before_and_measures_again_when_it_goes_on(whole, tmp_path):
    run = copied(whole, tmp_path, keep_steps=0)
    (tmp_path / "leaving.py").write_text(LEAVING)
    often = ["checkpoint.every_steps=3", "log.every_steps=2"]
    _, said = by_ranks(tmp_path / "leaving.py", "3", str(run), *SETTINGS, *often)
    assert said.count("evaluated [1, 1, 1]") == 2
    assert "stopped after step 3 of 8: the file stop" in said
    assert said.count("saved step_00000003") == 1
    assert [row["step"] for row in metrics(run) if "loss/training" in row] == [2, 3], "step 3 is not due"
    assert not any(FULL_LOSS in row for row in metrics(run))
    _, said = by_ranks(tmp_path / "leaving.py", "99", str(run), *SETTINGS, *often)
    assert said.index("resuming from the checkpoint of step 3") < said.index("step 3: validation loss")
    keys = ("step", FULL_LOSS)
    curves = [[[row[key] for key in keys] for row in metrics(r) if FULL_LOSS in row] for r in (whole, run)]
    assert curves[0] == curves[1]
    assert [row["step"] for row in metrics(run) if "loss/training" in row] == [2, 3, 4, 6, 8]
    before, after = masters(whole), masters(run)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.long
def test_the_model_of_another_checkpoint_does_not_stay(whole, tmp_path):
    run = copied(whole, tmp_path, keep_steps=STEPS)
    train(run)
    weights = run_dir(run) / "model" / "model.safetensors"
    before = weights.read_bytes()
    shutil.rmtree(run_dir(run) / "checkpoints")
    train(run, "optim.learning_rate=0.02")
    assert weights.read_bytes() != before


def test_a_run_can_be_moved_and_goes_on(whole, tmp_path):
    run = copied(whole, tmp_path / "before", keep_steps=4)
    run = (tmp_path / "before").rename(tmp_path / "after") / run.name
    train(run)
    before, after = masters(whole), masters(run)
    assert all(torch.equal(before[name], after[name]) for name in before)
    moved = run_dir((tmp_path / "after").rename(tmp_path / "again") / run.name)
    assert main(["eval", str(moved), "--subnets", "d1-g1-f32"]) == 0
    assert len(json.loads((moved / "subnets.json").read_text())["subnets"]) == 8


@pytest.mark.long
def test_a_changed_precision_is_told(whole, tmp_path):
    run = copied(whole, tmp_path, keep_steps=4)
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}))
    assert "changed since the last start: zero.json.bf16.enabled: not set before, true now" in train(run)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_rank_that_is_killed_takes_the_others_down_and_is_named(whole, tmp_path, victim):
    run = copied(whole, tmp_path, keep_steps=0)
    process = subprocess.Popen(command(run, "train.steps=4000"), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    next(line for line in process.stderr if line.startswith("step 2/"))
    launcher = psutil.Process(process.pid).children()[0]
    ranks = {rank.environ()["RANK"]: rank for rank in rank_processes(launcher.pid)}
    assert sorted(ranks) == ["0", "1"]
    start = time.monotonic()
    ranks[str(victim)].kill()
    said = process.communicate(timeout=60)[1]
    assert process.returncode not in (0, None)
    assert time.monotonic() - start < 30
    assert f"error: rank {victim} of 2 ended" in said
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks.values())


def test_a_rank_that_hangs_ends_the_run_and_all_say_where_they_stand(whole, tmp_path):
    run = copied(whole, tmp_path, keep_steps=0)
    (tmp_path / "staying.py").write_text(STAYING)
    start = time.monotonic()
    arguments = ["[0, 600]", str(run), *SETTINGS, "train.hang_minutes=0.2"]
    done = by_launcher("torchrun", str(tmp_path / "staying.py"), *arguments)
    assert done.returncode != 0
    assert time.monotonic() - start < 150
    assert "no progress for 0.2 minutes (train.hang_minutes). The stacks of all threads are in " in done.stderr
    stacks = [(run_dir(run) / "stacks" / f"rank_{rank:04d}.txt").read_text() for rank in (0, 1)]
    assert "in stay_here" in stacks[1]
    assert "in stay_here" not in stacks[0]
    assert "in all_reduce" in stacks[0]


def test_a_space_grows_on_purpose_and_is_refused_otherwise(whole, tmp_path):
    run = copied(whole, tmp_path, keep_steps=4)
    refused = one_error(train(run, "space.ffn=[16, 32, 64]", code=2))
    assert "a run with 8 of this run's 12 sub-networks. To train the others too from there on" in refused
    said = train(run, "space.ffn=[16, 32, 64]", "--extend-space")
    assert "the space grows from 8 to 12 sub-networks" in said
    assert "resuming from the checkpoint of step 4" in said
    assert len(json.loads((run_dir(run) / "model" / "sorted.json").read_text())["subnets"]) == 12
    before, after = masters(whole, 4), masters(run, 4)
    assert all(torch.equal(before[name], after[name]) for name in before)
    trained = [name for row in metrics(run) if row["step"] > 4 for name in row if name.startswith("subnets_visits/")]
    assert any(name.endswith("-f16") for name in trained)


@pytest.mark.long
def test_a_time_limit_saves_before_it_and_the_run_goes_on(whole, tmp_path):
    run = copied(whole, tmp_path, keep_steps=0)
    said = train(run, "train.steps=100000", "--time-limit", "0:15")
    assert ": the time limit; start the run again to resume" in said
    assert f"saved {sorted(path.name for path in (run_dir(run) / 'checkpoints').iterdir())[-1]}" in said
