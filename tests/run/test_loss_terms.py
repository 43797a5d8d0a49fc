"""`[loss]` and `[sampling]` in a run file: what they cost by `plan`, what is refused, and runs that use all of them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sorted_ds.commands.cli import main
from sorted_ds.nested import costs_of
from sorted_ds.nested.costs import head_flops
from sorted_ds.run.build import sampler_of
from sorted_ds.run.checks import check_run
from sorted_ds.run.plan import make_plan
from sorted_ds.run.run_file import load_run
from tests.batches import LLAMA
from tests.families import tiny_model
from tests.launched import copied, masters, metrics, one_error, run_dir, train
from tests.runs import run_file
from tests.trained import set_keys, tokenizer, trained_run

TERMS = [
    "loss.teacher=full",
    "loss.temperature=2.0",
    "loss.exit_weight=0.3",
    "loss.layer_dropout=0.5",
    "sampling.strategy=full_plus",
    "sampling.subnets_per_share=2",
    "sampling.cost_power=-0.5",
    "sampling.weights={d1-g1-f32 = 2.0}",
    "sampling.hold_steps=2",
    'sampling.phases=[{from_step = 3, strategy = "full", subnets_per_share = 1}, {from_step = 5, full_shares = 2}]',
]


def planned(folder: Path, *overrides: str, num_ranks: int = 1):
    run = load_run(run_file(folder), overrides)
    config, space = check_run(run)
    return make_plan(run, space, config, num_ranks), config


def from_checkpoint(folder: Path, teacher: str = "") -> Path:
    """Returns a run file that starts from a checkpoint. A directory of this name is made for its teacher."""
    run = run_file(folder)
    trained_run(folder / "base")
    if teacher:
        tiny_model("llama", seed=5, hidden_size=48, num_hidden_layers=2).save_pretrained(folder / teacher)
        tokenizer().save_pretrained(folder / teacher)
    text = run.read_text()
    start, stop = text.index("[model]"), text.index("[sampling]")
    space = "[space]\ndepths = [1, 4]\ngroups = [1, 4]\nffn = [32, 112]\n"
    run.write_text(f'{text[:start]}[model]\ninit = "base/model"\n{space}{text[stop:]}')
    return run


# What it costs


def test_a_teachers_passes_cost_a_forward_pass_of_the_full_network_without_its_head(tmp_path):
    plan, config = planned(tmp_path, "loss.teacher=full")
    head, full, num_tokens = head_flops(LLAMA, config), plan.subnets[-1], 400 * 8 * 32
    shares = sum(s.visits for s in plan.subnets if s.subnet != full.subnet) / (4 * 400)
    assert head == 2 * 64 * 300
    # The full network runs on the rows of the others, and its head predicts for each of them.
    assert plan.flops.teacher == pytest.approx(full.flops_per_token * shares * num_tokens, rel=0.02)
    assert plan.flops.run == pytest.approx(plan.flops.sampled + plan.flops.teacher)


def test_a_teacher_that_trains_on_the_same_rows_costs_its_predictions_alone(tmp_path):
    overrides = ("loss.teacher=full", "sampling.strategy=full_plus", "sampling.subnets_per_share=4")
    plan, config = planned(tmp_path, *overrides)
    assert plan.flops.teacher == pytest.approx(3 * head_flops(LLAMA, config) * 400 * 8 * 32)
    assert plan.tokens_per_step == 8 * 32
    assert sum(s.tokens for s in plan.subnets) == pytest.approx(4 * 400 * 8 * 32), "four pass over the same rows"


def test_exits_cost_their_heads_and_dropout_saves_layers(tmp_path):
    plan, config = planned(tmp_path / "exits", "loss.exit_weight=0.3")
    deep = sum(s.tokens for s in plan.subnets if s.subnet.startswith("d3"))
    assert plan.flops.exits == pytest.approx(3 * head_flops(LLAMA, config) * deep, rel=0.05)
    part, _ = planned(tmp_path / "part", "loss.exit_weight=0.3", "loss.exit_rate=0.25")
    assert part.flops.exits == pytest.approx(plan.flops.exits / 4, rel=0.1)
    plan, _ = planned(tmp_path / "dropout", "loss.layer_dropout=0.6")
    assert 0 < plan.flops.dropped < 0.3 * plan.flops.sampled
    assert plan.flops.run == pytest.approx(plan.flops.sampled - plan.flops.dropped)


def test_another_teacher_costs_its_forward_passes_and_its_weights(tmp_path):
    run = load_run(from_checkpoint(tmp_path, "teacher"), ["loss.teacher=teacher"])
    config, space = check_run(run)
    plan = make_plan(run, space, config, num_ranks=2)
    num_parameters = sum(value.numel() for value in load_file(tmp_path / "teacher" / "model.safetensors").values())
    assert plan.memory.teacher_bytes == 4 * num_parameters
    products = 2 * 2 * (num_parameters - 131 * 48) / 2  # without the embedding; norms are few
    assert plan.flops.teacher / (400 * 8 * 32) == pytest.approx(products, rel=0.15)


def test_a_run_without_terms_costs_what_is_sampled(tmp_path):
    plan, _ = planned(tmp_path)
    assert plan.flops.run == plan.flops.sampled
    assert plan.memory.teacher_bytes == 0


# What is sampled


def test_weights_are_factors_times_a_power_of_the_flops(tmp_path):
    run = load_run(run_file(tmp_path), ["sampling.cost_power=-1.0", "sampling.weights={d3-g2-f64 = 3.0}"])
    config, space = check_run(run)
    plan = make_plan(run, space, config, 1)
    by_name = {s.subnet: s for s in plan.subnets}
    small, full = by_name["d1-g1-f32"], by_name["d3-g2-f64"]
    assert full.visits / small.visits == pytest.approx(3 * small.flops_per_token / full.flops_per_token)


def test_a_ladder_is_what_is_sampled_and_the_rest_stays_in_the_space(tmp_path):
    plan, _ = planned(tmp_path, 'sampling.ladder=["d1-g1-f32", "d3-g2-f64"]')
    assert [s.subnet for s in plan.subnets if s.visits] == ["d1-g1-f32", "d3-g2-f64"]
    assert len(plan.subnets) == 8


def test_a_phase_takes_over_what_it_does_not_set(tmp_path):
    run = load_run(run_file(tmp_path), TERMS)
    phases = run.sampling.phases_by_step
    assert [phase.strategy for phase in phases.values()] == ["full", "full_plus"]
    assert [phase.subnets_per_share for phase in phases.values()] == [1, 2]
    assert all(phase.hold_steps == 2 for phase in phases.values())
    config, space = check_run(run)
    sampler = sampler_of(run, space, costs_of(space, LLAMA, config, run.batch.row_tokens))
    assert [sampler.num_shares(step) for step in range(6)] == [2, 2, 2, 4, 4, 2]


# What is refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["sampling.ladder=['d1']"],
            "sampling.ladder: d1 is not in the space, whose sub-networks are named like d3-g2-f64.",
        ),
        (['sampling.ladder=["d2-g1-f32"]'], "sampling.ladder: d2-g1-f32 is not in the space. Nearest"),
        (["sampling.weights={d1-g1-f33 = 2.0}"], "sampling.weights: d1-g1-f33 is not in the space."),
        (["sampling.weights={d1-g1-f32 = -1.0}"], "sampling.weights.d1-g1-f32 = -1.0 should be greater than"),
        (["sampling.subnets_per_share=3"], "sampling.subnets_per_step = 4 cannot be divided by"),
        (["sampling.phases=[{from_step = 400}]"], "sampling.phases has from_step = 400, but the last step is 399."),
        (["sampling.phases=[{strategy = 'full'}]"], "'sampling.phases.0.from_step' is missing."),
        (["sampling.phases=[{from_step = 3, stategy = 'full'}]"], "unknown key 'sampling.phases.0.stategy'."),
        (["sampling.phases=[{from_step = 3}, {from_step = 3}]"], "name each from_step once"),
        (["loss.teacher_weight=0"], "loss.teacher_weight = 0 should be greater than 0"),
        (["loss.layer_dropout=1.0"], "loss.layer_dropout = 1.0 should be less than 1"),
        (["loss.teacher=nowhere"], "'nowhere' is not a directory and cannot be downloaded"),
        (["loss.exit_rate=0.5"], "loss.exit_rate = 0.5 needs loss.exit_weight, which is 0."),
        (
            ["loss.exit_weight=0.3", "space.depths=[3]", "space.groups=[1, 2]"],
            "loss.exit_weight = 0.3, but no sub-network of the space begins with the layers of a shallower one",
        ),
        (
            ["loss.exit_weight=0.3", "space.layer_order=[2, 1, 0]"],
            "loss.exit_weight = 0.3, but no sub-network of the space begins with the layers of a shallower one",
        ),
    ],
)
def test_settings_that_cannot_be_followed_are_one_line(tmp_path, capsys, overrides, message):
    assert main(["plan", str(run_file(tmp_path)), *overrides]) == 2
    assert message in one_error(capsys.readouterr().err)


def test_a_teacher_needs_the_tokenizer_of_the_run(tmp_path, capsys):
    run = from_checkpoint(tmp_path, "teacher")

    def refused(*overrides: str) -> str:
        assert main(["plan", str(run), "loss.teacher=teacher", *overrides]) == 2
        return one_error(capsys.readouterr().err)

    assert main(["plan", str(run), "loss.teacher=teacher", "--json"]) == 0
    capsys.readouterr()
    set_keys(tmp_path / "teacher" / "config.json", max_position_embeddings=16)
    assert "Set batch.row_tokens to 16 or less, or name another teacher." in refused()
    set_keys(tmp_path / "teacher" / "config.json", max_position_embeddings=64)
    vocabulary = json.loads((tmp_path / "teacher" / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["a"], vocabulary["model"]["vocab"]["b"] = 98, 97
    (tmp_path / "teacher" / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert "has another tokenizer than data.tokenizer" in refused()
    assert main(["plan", str(run_file(tmp_path / "scratch")), f"loss.teacher={tmp_path / 'teacher'}"]) == 2
    assert "Set data.tokenizer = " in one_error(capsys.readouterr().err)


# Runs


def test_a_run_with_all_terms_resumes_bit_equal(tmp_path):
    run = run_file(tmp_path / "whole")
    train(run, *TERMS)
    resumed = copied(run, tmp_path / "resumed", keep_steps=4)
    assert "resuming from the checkpoint of step 4" in train(resumed, *TERMS)
    before, after = masters(run), masters(resumed)
    assert all(torch.equal(before[name], after[name]) for name in before)
    rows = [row for row in metrics(run) if "loss/training" in row]
    assert all(row["loss/divergence"] > 0 for row in rows if row["step"] not in (4, 5))
    assert all("loss/divergence" not in row for row in rows if row["step"] in (4, 5)), "the full network alone"
    exits = {key for row in rows for key in row if key.startswith("subnets_exit_loss/")}
    assert exits <= {f"subnets_exit_loss/d1-g{groups}-f{ffn}" for groups in (1, 2) for ffn in (32, 64)}
    assert "subnets_exit_loss/d1-g2-f64" in exits


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.long)])
def test_another_model_teaches_a_run_from_a_checkpoint(tmp_path, stage):
    run = from_checkpoint(tmp_path, "teacher")
    (run.parent / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    overrides = ["loss.teacher=teacher", "loss.teacher_weight=1.0", "train.steps=30", "checkpoint.every_steps=30"]
    train(run, *overrides, "eval.every_steps=0", "log.every_steps=5")
    divergences = [row["loss/divergence"] for row in metrics(run) if "loss/training" in row]
    assert divergences[-1] < 0.7 * divergences[0], "it comes nearer to its teacher"
    shutil.rmtree(run_dir(run))
