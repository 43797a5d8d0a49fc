"""Training for real: `sorted-ds train`, the deepspeed launcher, two ranks, ZeRO, a tiny run.

What it must give: the losses of an independent single-process computation; bit-equal results after an interruption, and
equal ones to rounding on another number of ranks; one-line errors, on all ranks, that leave nothing half done.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sorted_ds.checkpoint import read_master_weights
from sorted_ds.cli import main
from sorted_ds.data.prepare import find_prepared
from sorted_ds.launcher import free_port
from sorted_ds.learning_rate import lr_at
from sorted_ds.nested import costs_of
from sorted_ds.resolve import check_run, data_spec, schedule_of
from sorted_ds.run_file import load_run
from sorted_ds.shuffle import Shuffle
from tests import reference
from tests.runs import run_file

ROOT = Path(__file__).parent.parent
STEPS = 8
SETTINGS = [f"train.steps={STEPS}", "checkpoint.every_steps=4", "checkpoint.keep_last=9", "log.every_steps=1"]
SETTINGS += ["eval.every_steps=3", "optim.learning_rate=0.01", "optim.eps=1e-6", "optim.warmup_steps=3"]


def command(run: Path, *settings: str, ranks: int = 2) -> list[str]:
    script = "import sys; from sorted_ds.cli import main; sys.exit(main())"
    return [sys.executable, "-c", script, "train", str(run), *SETTINGS, *settings, "--ranks", str(ranks)]


def train(run: Path, *settings: str, ranks: int = 2, code: int = 0, **kwargs) -> str:
    """What it says on stderr."""
    done = subprocess.run(
        command(run, *settings, ranks=ranks),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        **kwargs,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr


def run_dir(run: Path) -> Path:
    return run.parent / "runs" / run.stem


def masters(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return read_master_weights(run_dir(run) / "checkpoints" / f"step_{step:08d}")


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir(run) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run file of a run of 8 steps on 2 ranks, uninterrupted."""
    run = run_file(tmp_path_factory.mktemp("whole"))
    train(run)
    return run


def copied(whole: Path, folder: Path, keep_steps: int) -> Path:
    """The same run as if it had been interrupted after a checkpoint."""
    shutil.copytree(whole.parent, folder, dirs_exist_ok=True)
    run = folder / whole.name
    for path in (run_dir(run) / "checkpoints").iterdir():
        if path.name > f"step_{keep_steps:08d}":
            shutil.rmtree(path)
    shutil.rmtree(run_dir(run) / "model")
    return run


def reference_losses(run: Path) -> list[float]:
    """The training loss of every step, by plain single-process PyTorch on the rows and draws that the run states."""
    settings = load_run(run, SETTINGS)
    config, space = check_run(settings)
    tokens = find_prepared(data_spec(settings), settings.data.cache_dir)
    schedule = schedule_of(settings, costs_of(space, config, settings.batch.row_tokens))
    model = initial_model(run)
    optimizer = reference.optimizer_of(model, settings.optim)
    losses = []
    for step in range(STEPS):
        micro_batches = [
            (subnet, ids[:, :-1], ids[:, 1:])
            for draw, subnet in enumerate(schedule.draw(step))
            for ids in [torch.stack([row(tokens.train, step * 8 + draw * 2 + i) for i in range(2)])]
        ]
        with torch.no_grad():
            losses.append(sum(float(reference.summed_loss(model, batch)) for batch in micro_batches) / (8 * 32))
        reference.accumulate(model, micro_batches)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, STEPS, settings.optim)
        optimizer.step()
    return losses


def row(tokens, position: int) -> torch.Tensor:
    num_rows = (len(tokens) - 1) // 32
    number = Shuffle(num_rows, (17, "rows", position // num_rows))(position % num_rows)
    return torch.tensor(tokens[number * 32 : number * 32 + 33].astype("int64"))


def initial_model(run: Path):
    """A plain model with the weights that the run started from: one step with a learning rate of almost nothing."""
    first = run_file(run.parent / "first")
    train(first, "train.steps=1", "optim.learning_rate=1e-30", "optim.weight_decay=0", "eval.rows=1", ranks=1)
    return AutoModelForCausalLM.from_pretrained(run_dir(first) / "model", dtype=torch.float32)


def test_losses_are_those_of_plain_pytorch_on_the_same_rows_and_draws(whole):
    found = [row["loss/training"] for row in metrics(whole) if "loss/training" in row]
    assert found == pytest.approx(
        reference_losses(whole), rel=2e-5
    )  # AdamW amplifies rounding: tests/test_engine_exact


def test_everything_is_written(whole):
    folder = run_dir(whole)
    assert {"run.json", "metrics.jsonl", "model", "subnets.json", "pareto.png", "checkpoints", "tensorboard"} == {
        path.name for path in folder.iterdir()
    }
    assert len(json.loads((folder / "subnets.json").read_text())["subnets"]) == 8
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert (model.config.vocab_size, model.config.eos_token_id) == (len(tokenizer), tokenizer.eos_token_id)
    run = json.loads((folder / "run.json").read_text())
    assert run["run"]["train"]["steps"] == STEPS
    assert run["deepspeed"]["managed_gradient_accumulation"] is False
    assert run["versions"].keys() >= {"torch", "deepspeed", "transformers"}


def test_metrics_hold_losses_rates_speeds_and_visits(whole):
    rows = metrics(whole)
    trained = [row for row in rows if "loss/training" in row]
    assert [row["step"] for row in trained] == list(range(1, STEPS + 1))
    for key in ("optimizer/learning_rate", "optimizer/gradient_norm", "speed/tokens_per_second", "speed/memory_gib"):
        assert all(row[key] > 0 for row in trained)
    draws = [sum(value for key, value in row.items() if key.startswith("subnets_draws/")) for row in trained]
    assert draws == pytest.approx([4] * STEPS)
    evaluated = [row for row in rows if "loss/full_validation" in row]
    assert [row["step"] for row in evaluated] == [3, 6, STEPS]
    assert next(iter(evaluated[0])) == "step"
    assert list(evaluated[0])[1] == "loss/full_validation"
    assert evaluated[0]["loss/full_validation"] == evaluated[0]["subnets_validation_loss/d3-g2-f64"]


def test_tensorboard_shows_the_same_numbers(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run_dir(whole) / "tensorboard"))
    board.Reload()
    found = [(event.step, event.value) for event in board.Scalars("loss/training")]
    expected = [(row["step"], pytest.approx(row["loss/training"])) for row in metrics(whole) if "loss/training" in row]
    assert found == expected


def test_an_interrupted_run_ends_bit_equal(whole, tmp_path):
    run = copied(whole, tmp_path, keep_steps=4)
    assert "going on from the checkpoint of step 4" in train(run)
    before, after = masters(whole), masters(run)
    assert all(torch.equal(before[name], after[name]) for name in before)
    exported = [load_file(run_dir(r) / "model" / "model.safetensors") for r in (whole, run)]
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])
    strip = ("speed/tokens_per_second", "speed/step_seconds", "speed/memory_gib", "speed/validation_seconds")
    lines = [[{k: v for k, v in row.items() if k not in strip} for row in metrics(r)] for r in (whole, run)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("ranks", [1, 3])
def test_another_number_of_ranks_ends_equal_to_rounding(whole, tmp_path, ranks):
    run = copied(whole, tmp_path, keep_steps=4)
    train(run, ranks=ranks)
    before, after = masters(whole), masters(run)
    assert max(float((before[name] - after[name]).abs().max()) for name in before) <= 5e-5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_saves_and_the_run_goes_on_bit_equal(whole, tmp_path, number):
    run = copied(whole, tmp_path, keep_steps=0)
    process = subprocess.Popen(command(run), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("step 2/"):
            process.send_signal(number)
            break
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    assert "start the run again to go on" in said
    saved = sorted(path.name for path in (run_dir(run) / "checkpoints").iterdir())
    assert f"saved {saved[-1]}" in said
    train(run)
    before, after = masters(whole), masters(run)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_killed_run_goes_on_from_its_last_checkpoint_bit_equal(whole, tmp_path):
    run = copied(whole, tmp_path, keep_steps=0)
    process = subprocess.Popen(command(run), cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stderr:
        if line.startswith("step 6/"):
            break
    subprocess.run(["pkill", "-9", "-f", str(run)], check=True)
    process.wait()
    time.sleep(0.2)
    assert "going on from the checkpoint of step 4" in train(run)
    before, after = masters(whole), masters(run)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_finished_run_trains_no_more_and_a_longer_one_goes_on(whole, tmp_path):
    run = copied(whole, tmp_path, keep_steps=STEPS)
    said = train(run, "train.steps=9")
    assert "changed since the last start: train.steps: 8 before, 9 now" in said
    assert "step 9/9" in said
    assert "step 8/9" not in said


ENGINES = [{}, *({"zero_optimization": {"stage": stage}} for stage in (2, 3))]


@pytest.mark.parametrize("engine", ENGINES, ids=["stage 0", "stage 2", "stage 3"])
def test_every_stage_ends_with_the_same_weights_to_rounding(whole, tmp_path, engine):
    run = copied(whole, tmp_path, keep_steps=0)
    (tmp_path / "zero.json").write_text(json.dumps(engine))
    train(run)
    before, after = masters(whole), masters(run)
    assert max(float((before[name] - after[name]).abs().max()) for name in before) <= 5e-5


def test_bf16_with_activation_checkpointing_learns(tmp_path):
    run = run_file(tmp_path, engine={"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}})
    train(run, "model.activation_checkpointing=true", "train.steps=20", "log.every_steps=5")
    losses = [row["loss/training"] for row in metrics(run) if "loss/training" in row]
    assert losses[-1] < losses[0] - 0.3
    assert AutoModelForCausalLM.from_pretrained(run_dir(run) / "model").dtype == torch.bfloat16


def test_an_ordinary_checkpoint_becomes_a_sorted_model_and_keeps_its_tokenizer(whole, tmp_path):
    run = run_file(tmp_path)
    shutil.copytree(run_dir(whole) / "model", tmp_path / "pretrained")
    (tmp_path / "pretrained" / "sorted.json").unlink()
    text = run.read_text()
    start, stop = text.index("[model]"), text.index("[space]")
    run.write_text(f'{text[:start]}[model]\ninit = "pretrained"\n{text[stop:]}')
    train(run, "train.steps=1", "optim.learning_rate=1e-30", "optim.weight_decay=0")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "pretrained", run_dir(run) / "model")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    tokenizers = [folder / "tokenizer.json" for folder in (tmp_path / "pretrained", run_dir(run) / "model")]
    assert json.loads(tokenizers[0].read_text()) == json.loads(tokenizers[1].read_text())


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(whole, tmp_path):
    run = copied(whole, tmp_path, keep_steps=4)
    said = train(run, "optim.learning_rate=1e30", "optim.clip_norm=0", code=2)
    errors = [line for line in said.splitlines() if line.startswith("error")]
    assert len(errors) == 1, said
    assert "Nothing was saved. Last good checkpoint: " in errors[0]
    assert errors[0].endswith("step_00000004.")
    assert sorted(p.name for p in (run_dir(run) / "checkpoints").iterdir()) == ["step_00000004"]


def one_error(said: str) -> str:
    assert "Traceback" not in said, said
    errors = [line for line in said.splitlines() if line.startswith("error")]
    assert len(errors) == 1, said
    return errors[0]


def test_a_checkpoint_that_cannot_be_written_is_one_error_and_the_last_good_one_stays(whole, tmp_path):
    run = copied(whole, tmp_path, keep_steps=4)

    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    said = train(run, code=2, preexec_fn=little_room)
    assert "the checkpoint could not be written" in one_error(said)
    assert [p.name for p in (run_dir(run) / "checkpoints").iterdir()] == ["step_00000004"]


def test_another_runs_directory_and_a_missing_shard_are_named(whole, tmp_path):
    run = copied(whole, tmp_path, keep_steps=4)
    assert "belongs to another run: seed = 17 there, 18 here" in one_error(train(run, "seed=18", code=2))
    (run_dir(run) / "checkpoints" / "step_00000004" / "rank_0001.safetensors").unlink()
    assert "rank_0001.safetensors is missing. Delete step_00000004" in one_error(train(run, code=2))


def test_a_truncated_token_file_is_named(whole, tmp_path):
    run = copied(whole, tmp_path, keep_steps=4)
    path = next((tmp_path / "cache").glob("*/train.bin"))
    path.write_bytes(path.read_bytes()[:-10])
    assert "train.bin" in one_error(train(run, code=2))


LAUNCHERS = {
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "{port}"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "{port}"],
}


def by_launcher(name: str, script: str, *arguments: str) -> subprocess.CompletedProcess:
    flags = [flag.format(port=free_port()) for flag in LAUNCHERS[name]]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *flags, script, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_script_of_a_cluster_gives_the_same_weights_under_each_launcher(whole, tmp_path, name):
    run = copied(whole, tmp_path, keep_steps=0)
    done = by_launcher(name, "launch/train.py", str(run), *SETTINGS)
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = masters(whole), masters(run)
    assert all(torch.equal(before[name], after[name]) for name in before)


LYING = """
import os, sys
from sorted_ds.train import main
settings = ["schedule.strategy=uniform"] if os.environ["RANK"] == "1" else []
sys.exit(main([*sys.argv[1:], *settings]))
"""


def test_ranks_that_disagree_are_one_error_before_anything_is_trained(whole, tmp_path):
    run = copied(whole, tmp_path, keep_steps=0)
    (tmp_path / "lying.py").write_text(LYING)
    done = by_launcher("torchrun", str(tmp_path / "lying.py"), str(run), *SETTINGS)
    assert done.returncode != 0
    assert 'rank 1 has schedule.strategy = "uniform", rank 0 has "stratified"' in done.stderr
    assert not list((run_dir(run) / "checkpoints").iterdir())


LYING_LATER = """
import os, sys
from sorted_ds.schedule import SubNetSchedule
from sorted_ds.train import main
draw = SubNetSchedule.draw
def lie(self, step):
    return draw(self, step)[:-1] + [self.subnets[0]] if step == 3 else draw(self, step)
if os.environ["RANK"] == "1":
    SubNetSchedule.draw = lie
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_that_draw_otherwise_at_a_later_step_are_one_error_within_seconds(whole, tmp_path, stage):
    run = copied(whole, tmp_path, keep_steps=0)
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    (tmp_path / "lying.py").write_text(LYING_LATER)
    start = time.perf_counter()
    done = by_launcher("torchrun", str(tmp_path / "lying.py"), str(run), *SETTINGS)
    assert time.perf_counter() - start < 120  # a hang would last for minutes
    assert done.returncode != 0
    assert "error: ranks disagree: step 3 draws " in done.stderr
    assert [row["step"] for row in metrics(run) if "loss/training" in row] == [1, 2, 3]


def test_a_run_shorter_than_its_checkpoint_is_refused(whole, tmp_path):
    run = copied(whole, tmp_path, keep_steps=STEPS)
    assert "train.steps = 5, but" in one_error(train(run, "train.steps=5", code=2))


def test_before_training_the_plan_and_its_warnings_are_told(whole, tmp_path):
    said = train(run_file(tmp_path), "train.steps=1")
    assert "8 of 8 sub-networks are expected fewer than 100 visits" in said
    assert all(name in said for name in ("d1-g1-f32", "d3-g2-f64", "rows that are padding: 0.0%"))


def test_a_run_can_be_moved_and_goes_on(whole, tmp_path):
    run = copied(whole, tmp_path / "before", keep_steps=4)
    run = (tmp_path / "before").rename(tmp_path / "after") / run.name
    train(run)
    before, after = masters(whole), masters(run)
    assert all(torch.equal(before[name], after[name]) for name in before)
    moved = run_dir((tmp_path / "after").rename(tmp_path / "again") / run.name)
    assert main(["eval", str(moved), "--subnets", "d1-g1-f32"]) == 0
    assert len(json.loads((moved / "subnets.json").read_text())["subnets"]) == 8


def test_a_changed_precision_is_told(whole, tmp_path):
    run = copied(whole, tmp_path, keep_steps=4)
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}))
    assert "changed since the last start: zero.json.bf16.enabled: not set before, true now" in train(run)


def test_a_rank_alone_is_told_to_prepare_first(tmp_path):
    run = run_file(tmp_path)
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "launch/train.py", str(run)], cwd=ROOT, capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 2
    assert "Run `sorted-ds prepare" in one_error(done.stderr)
