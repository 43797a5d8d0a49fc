"""A family, axes, a task and plans of passes that only tests know are prepared, trained, evaluated and exported.

Each comes from tests/toys.py through a seam (DESIGN, section 3), and no module of the package is touched.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sorted_ds.commands.cli import main
from sorted_ds.deploy.model_dir import ModelDir
from sorted_ds.nested import extract
from tests import toys
from tests.runs import run_file
from tests.spawn import on_ranks
from tests.trained import load_nested

TOY = (
    'model.family="toy"',
    "model.config={channels = 16, width = 48, num_blocks = 3}",
    "space.groups=[]",
    "space.ffn=[]",
    "space.widths=[16, 48]",
    "space.depths=[1, 3]",
)
STEPS = 4


@pytest.fixture(autouse=True, scope="module")
def toys_are_known() -> Iterator[None]:
    with toys.registered():
        yield


def trained(folder: Path, *overrides: str, ranks: int = 2, stage: int = 2, command: str = "whole") -> Path:
    """The directory of a run that was prepared and trained with these keys."""
    run = run_file(folder, steps=STEPS, engine={"zero_optimization": {"stage": stage}})
    keys = [*overrides, "checkpoint.every_steps=2", "log.every_steps=1"]
    assert main(["prepare", str(run), *keys]) == 0
    on_ranks(ranks, toys.train_here, run, keys, folder=folder / command)
    return folder / "runs" / "tiny"


def measured(run_dir: Path) -> dict[str, dict]:
    return {row["subnet"]: row for row in json.loads((run_dir / "subnets.json").read_text())["subnets"]}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("toy"), *TOY, "space.layer_order=[2, 0, 1]")


def test_a_family_with_two_axes_of_its_own_is_trained_and_every_sub_network_measured(toy):
    assert set(measured(toy)) == {"d1-w16", "d1-w48", "d3-w16", "d3-w48"}
    assert all(0 < row["loss"] < 6 for row in measured(toy).values())
    assert (toy / "pareto.png").stat().st_size > 10_000


def test_eval_from_disk_gives_what_training_measured(toy):
    before = measured(toy)
    assert main(["eval", str(toy)]) == 0
    for name, row in measured(toy).items():
        assert row["loss"] == pytest.approx(before[name]["loss"], rel=1e-5)


def test_a_sub_network_of_the_family_is_exported_with_its_own_layers_and_width(toy, tmp_path):
    assert main(["export", str(toy), "--subnet", "d1-w16", "--out", str(tmp_path / "small")]) == 0
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert (small.config.num_blocks, small.config.width) == (1, 16)
    assert small.config.block_scales == [2.0], "depth 1 of the order has layer 2"
    nested = load_nested(toy)
    nested.set_subnet("d1-w16")
    ids = torch.arange(24).view(2, 12)
    assert torch.allclose(small.eval()(ids).logits, nested.eval()(ids).logits, atol=1e-6)


def test_select_looks_a_family_up_as_any_other(toy, capsys):
    assert main(["select", str(toy), "--max-params", "1B"]) == 0
    assert capsys.readouterr().out.strip() in measured(toy)


def test_a_space_may_have_one_size_along_an_axis(tmp_path):
    run_dir = trained(tmp_path, "space.groups=[2]", "train.steps=2")
    assert {name.split("-")[1] for name in measured(run_dir)} == {"g2"}


def test_axes_that_a_family_does_not_have_are_refused_in_one_line(tmp_path, capsys):
    run = run_file(tmp_path)
    assert main(["plan", str(run), "space.groups=[]", "space.ffn=[]", "space.widths=[16, 48]"]) == 2
    told = capsys.readouterr().err
    assert "d3-w48, but llama has the axes d, g, f" in told
    assert len(told.strip().splitlines()) == 1


def test_a_task_with_another_batch_and_metric_is_trained_measured_and_shown(tmp_path, capsys):
    run_dir = trained(tmp_path, 'task="weighted_lm"', "train.steps=2")
    rows = measured(run_dir)
    assert all(set(row) >= {"loss", "top5"} and "perplexity" not in row for row in rows.values())
    assert main(["eval", str(run_dir), "--rows", "16"]) == 0
    shown = capsys.readouterr().out
    assert "weighted loss" in shown
    assert "top 5" in shown
    assert measured(run_dir)["d3-g2-f64"]["top5"] == pytest.approx(rows["d3-g2-f64"]["top5"])
    assert main(["export", str(run_dir), "--subnet", "d1-g1-f32", "--out", str(tmp_path / "small")]) == 0
    assert "validation top 5" in (tmp_path / "small" / "README.md").read_text()


@pytest.mark.parametrize("strategy", toys.TOY_STRATEGIES)
def test_a_plan_of_passes_runs_from_a_run_file(tmp_path, strategy):
    keys = (f'sampling.strategy="{strategy}"', "sampling.subnets_per_step=4", "train.steps=2")
    run_dir = trained(tmp_path, *keys, stage=3)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    visits = sum(value for row in rows for key, value in row.items() if key.startswith("subnets_visits/"))
    assert visits == pytest.approx(2 * (4 if strategy == "taught" else 3))
    assert len(measured(run_dir)) == 8


# State: a buffer, and a norm that each depth owns


def checkpoint_files(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted((run_dir / "checkpoints" / f"step_{step:08d}").glob("*.safetensors")):
        found |= {f"{path.stem}|{name}": tensor for name, tensor in load_file(path).items()}
    return found


def test_buffers_and_owned_tensors_are_in_checkpoints_and_beside_the_model(toy):
    names = {name.partition("|")[2] for name in checkpoint_files(toy, STEPS)}
    assert any(name.startswith("backbone.last.weight@d1|") for name in names)
    assert any(name.startswith("backbone.last.weight@d3|") for name in names)
    assert any("backbone.seen" in name for name in names)
    plain, owned = load_file(toy / "model" / "model.safetensors"), load_file(toy / "model" / "owned.safetensors")
    assert set(owned) == {"backbone.last.weight@d1", "backbone.last.bias@d1"}
    assert "backbone.seen" in plain
    assert plain["backbone.seen"].abs().max() > 0, "training moves the buffer"
    assert not torch.equal(owned["backbone.last.weight@d1"], plain["backbone.last.weight"]), "each depth trains its own"


def test_what_a_sub_network_exports_is_complete_and_nothing_more(toy, tmp_path):
    owned = load_file(toy / "model" / "owned.safetensors")
    for name, expected in (("d1-w48", owned["backbone.last.weight@d1"]), ("d3-w48", None)):
        assert main(["export", str(toy), "--subnet", name, "--out", str(tmp_path / name)]) == 0
        written = load_file(tmp_path / name / "model.safetensors")
        assert not any("@" in key or "copies" in key for key in written)
        plain = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(tmp_path / name).config)
        assert set(written) == set(plain.state_dict())
        if expected is not None:
            assert torch.equal(written["backbone.last.weight"], expected)
        assert not (tmp_path / name / "owned.safetensors").exists()


def test_extract_chooses_the_copy_of_its_depth(toy):
    nested = load_nested(toy)
    owned = load_file(toy / "model" / "owned.safetensors")
    assert torch.equal(extract(nested, "d1-w16").backbone.last.weight, owned["backbone.last.weight@d1"])
    assert not torch.equal(extract(nested, "d3-w16").backbone.last.weight, owned["backbone.last.weight@d1"])


@pytest.mark.parametrize(("stage", "then_stage", "then_ranks"), [(2, 2, 2), (1, 3, 2), (3, 0, 1)])
def test_a_killed_run_goes_on_with_buffers_and_owned_tensors(toy, tmp_path, stage, then_stage, then_ranks):
    """The weights are bit-equal at the same stage on as many ranks, and equal to rounding otherwise."""
    keys = [*TOY, "space.layer_order=[2, 0, 1]", "checkpoint.every_steps=2", "log.every_steps=1"]
    keys += ["checkpoint.asynchronous=false"]  # so that step 2 is saved when the ranks are killed after step 3
    run = run_file(tmp_path, steps=STEPS, engine={"zero_optimization": {"stage": stage}})
    assert main(["prepare", str(run), *keys]) == 0
    with pytest.raises(AssertionError, match="failed or hung"):
        on_ranks(2, toys.train_here, run, keys, 3, folder=tmp_path / "killed")
    assert (tmp_path / "runs" / "tiny" / "checkpoints" / "step_00000002").is_dir()
    assert not (tmp_path / "runs" / "tiny" / "model").exists()
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": then_stage}}))
    on_ranks(then_ranks, toys.train_here, run, keys, folder=tmp_path / "resumed")
    assert "resuming from the checkpoint of step 2" in (tmp_path / "resumed" / "rank0.log").read_text()
    for file in ("model.safetensors", "owned.safetensors"):
        whole, resumed = (load_file(folder / "model" / file) for folder in (toy, tmp_path / "runs" / "tiny"))
        assert whole.keys() == resumed.keys()
        for name, tensor in whole.items():
            if then_ranks == 2 and stage == then_stage == 2:
                assert torch.equal(tensor, resumed[name]), name
            else:
                assert torch.allclose(tensor, resumed[name], atol=2e-6), name


def test_another_layer_order_is_refused_in_one_line(toy, tmp_path):
    run = run_file(tmp_path, steps=STEPS)
    keys = [*TOY, "space.layer_order=[0, 1, 2]", f"run_dir={toy}"]
    assert main(["prepare", str(run), *keys]) == 0
    with pytest.raises(AssertionError, match=r"belongs to another run: space\.layer_order = \[2, 0, 1\] there"):
        on_ranks(1, toys.train_here, run, keys, folder=tmp_path / "other")


def test_the_table_says_which_task_and_order_it_is_of(toy):
    contents = ModelDir.find(toy).read()
    assert contents.task == "causal_lm"
    assert contents.sub_networks.layer_order == (2, 0, 1)
