"""Training for real: `sorted-ds train`, the deepspeed launcher, two ranks, ZeRO, a tiny run.

What it must give: the losses of an independent single-process computation, all files, under each launcher and stage.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sorted_ds.base.shuffle import Shuffle
from sorted_ds.cluster.launcher import free_port
from sorted_ds.deploy.model_dir import ModelDir
from sorted_ds.nested import costs_of
from sorted_ds.run.build import sampler_of
from sorted_ds.run.checks import check_run
from sorted_ds.run.learning_rate import lr_at
from sorted_ds.run.plan import make_plan
from sorted_ds.run.run_file import load_run
from tests import reference
from tests.batches import LLAMA, TASK
from tests.launched import (
    LAUNCHERS,
    SAID,
    SETTINGS,
    STEPS,
    by_launcher,
    copied,
    masters,
    metrics,
    run_dir,
    train,
)
from tests.runs import run_file


def reference_losses(run: Path) -> list[float]:
    """The training loss of every step, by plain PyTorch in one process on the rows and sub-networks of the run."""
    settings = load_run(run, SETTINGS)
    config, space = check_run(settings)
    tokens = TASK.find_prepared(settings)
    sampler = sampler_of(settings, space, costs_of(space, LLAMA, config, settings.batch.row_tokens))
    model = initial_model(run)
    optimizer = reference.optimizer_of(model, settings.optim)
    losses = []
    for step in range(STEPS):
        micro_batches = [
            (subnet, ids[:, :-1], ids[:, 1:])
            for share, subnet in enumerate(sampler.sample(step))
            for ids in [torch.stack([row(tokens.train, step * 8 + share * 2 + i) for i in range(2)])]
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


def test_losses_are_those_of_plain_pytorch_on_the_same_rows_and_sub_networks(whole):
    found = [row["loss/training"] for row in metrics(whole) if "loss/training" in row]
    assert found == pytest.approx(
        reference_losses(whole), rel=2e-5
    )  # AdamW amplifies rounding: tests/engine/test_exact


def test_everything_is_written(whole):
    folder = run_dir(whole)
    written = {"run.json", "metrics.jsonl", "model", "subnets.json", "pareto.png", "checkpoints", "tensorboard"}
    assert written | {".lock"} == {path.name for path in folder.iterdir()}
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
    visits = [sum(value for key, value in row.items() if key.startswith("subnets_visits/")) for row in trained]
    assert visits == pytest.approx([4] * STEPS)
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


ENGINES = [
    pytest.param({}, marks=pytest.mark.long, id="stage 0"),
    pytest.param({"zero_optimization": {"stage": 2}}, marks=pytest.mark.long, id="stage 2"),
    pytest.param({"zero_optimization": {"stage": 3}}, id="stage 3"),
]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_stage_ends_with_the_same_weights_to_rounding(whole, tmp_path, engine):
    run = copied(whole, tmp_path, keep_steps=0)
    (tmp_path / "zero.json").write_text(json.dumps(engine))
    train(run)
    before, after = masters(whole), masters(run)
    assert max(float((before[name] - after[name]).abs().max()) for name in before) <= 5e-5
    written = load_file(run_dir(run) / "model" / "model.safetensors")
    for name, weight in after.items():
        is_transposed = name.endswith(("o_proj.weight", "down_proj.weight"))
        assert torch.equal((written[name].t() if is_transposed else written[name]).flatten(), weight)


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
    (tmp_path / "pretrained" / "LICENSE").write_text("terms")
    (tmp_path / "pretrained" / "README.md").write_text("---\nlicense: mit\n---\n")
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
    assert (run_dir(run) / "model" / "LICENSE").read_text() == "terms"
    assert ModelDir.find(run_dir(run)).read().base == {"trained_from": "checkpoint", "license": "mit"}


def test_a_checkpoint_has_the_bytes_that_were_planned(whole):
    settings = load_run(whole, SETTINGS)
    config, space = check_run(settings)
    planned = make_plan(settings, space, config, 2).checkpoint_bytes
    shards = (run_dir(whole) / "checkpoints" / f"step_{STEPS:08d}").glob("rank_*.safetensors")
    sizes = [path.stat().st_size for path in shards]
    assert planned <= sum(sizes) <= planned * 1.05  # names come on top
    assert max(sizes) <= planned / 2 * 1.05


def test_before_training_the_plan_and_its_warnings_are_told(whole):
    said = (whole.parent / SAID).read_text()
    assert "8 of 8 sub-networks are expected to get fewer than 100 visits" in said
    assert all(name in said for name in ("d1-g1-f32", "d3-g2-f64", "rows that are padding: 0.0%"))


@pytest.mark.parametrize(
    "name", [pytest.param("deepspeed", marks=pytest.mark.long), *(n for n in LAUNCHERS if n != "deepspeed")]
)
def test_the_script_of_a_cluster_gives_the_same_weights_under_each_launcher(whole, tmp_path, name):
    run = copied(whole, tmp_path, keep_steps=0)
    done = by_launcher(name, "launch/train.py", str(run), *SETTINGS, port=(port := free_port()))
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*")), "DeepSpeed left its segments"
    before, after = masters(whole), masters(run)
    assert all(torch.equal(before[name], after[name]) for name in before)
