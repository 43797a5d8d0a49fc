"""Sub-networks that were never trained are cut, evaluated, selected and exported like the others, and say so."""

import json
import math

import pytest
from transformers import AutoModelForCausalLM

from sorted_ds import SubNet, SubNetSpace, UserError, load
from sorted_ds.commands.cli import main
from sorted_ds.deploy.mix import PROPOSED_AT_MOST, propose
from sorted_ds.deploy.model_dir import ModelDir
from sorted_ds.deploy.select import Budgets
from sorted_ds.deploy.speed import MeasuredOn, Setting, Speed
from sorted_ds.nested import costs_of
from sorted_ds.nested.family import cuttable
from tests.batches import LLAMA
from tests.families import VARIANTS, tokens
from tests.parity import run_reference
from tests.runs import run_file
from tests.toys import ToyFamily, registered
from tests.trained import ROW_TOKENS, made_up_table, measured_run, trained_run

NEVER = "d3-g1-f80"
ORDER = (2, 0, 3, 1)
HERE = MeasuredOn("a device", "float32", 1, "2.13.0", "5.24.0")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_depth_between_trained_ones_is_cut_along_the_layer_order(variant, tmp_path):
    family = load(trained_run(tmp_path, variant, layer_order=ORDER))
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    expected = run_reference(full, SubNet.parse(NEVER), tokens(), ORDER).logits
    assert (family[NEVER](tokens()).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert NEVER not in family
    assert len(family) == 27


def test_what_can_be_cut_has_trained_widths_and_any_depth_between():
    ladder = SubNetSpace.of(["d2-g1-f32", "d4-g2-f80", "d6-g4-f112"], layer_order=[5, 4, 3, 2, 1, 0])
    found = cuttable(ladder, LLAMA)
    assert {(s.depth, s["g"], s["f"]) for s in found} == {
        (d, g, f) for d in (2, 3, 4, 5, 6) for g in (1, 2, 4) for f in (32, 80, 112)
    }
    assert found.layer_order == ladder.layer_order


def test_a_sub_network_that_would_own_what_was_never_trained_cannot_be_cut():
    """The toy family has a norm for each depth."""
    with registered():
        space = SubNetSpace.of(["d1-w16", "d3-w48"])
        assert [s.name for s in cuttable(space, ToyFamily())] == ["d1-w16", "d1-w48", "d3-w16", "d3-w48"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("d3-g2-f80", r"d3-g2-f80 cannot be cut from this family\. Nearest that can: d3-g3-f80 \(never trained\), "),
        ("d3-g1-f81", r"d3-g1-f81 cannot be cut from this family\. Nearest that can: d3-g1-f80"),
        ("d5-g1-f80", r"d5-g1-f80 cannot be cut from this family\. Nearest that can: d4-g1-f80"),
        ("d3-f80", "whose sub-networks are named like d4-g4-f112"),
        ("small", "is not the name of a sub-network"),
    ],
)
def test_sizes_that_cannot_be_cut_name_the_nearest(name, message, tmp_path, capsys):
    run = measured_run(tmp_path)
    with pytest.raises(UserError, match=message):
        load(run)[name]
    for command in (["eval", str(run), "--subnets", name], ["export", str(run), "--subnet", name, "--out", "x"]):
        assert main(command) == 2
        assert "error: " in capsys.readouterr().err


def test_an_export_says_that_it_was_never_trained(tmp_path):
    run, out = trained_run(tmp_path / "run"), tmp_path / "small"
    assert main(["export", str(run), "--subnet", NEVER, "--out", str(out)]) == 0
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 3
    assert "never trained itself" in " ".join((out / "README.md").read_text().split())
    assert main(["export", str(run), "--subnet", "d2-g1-f80", "--out", str(tmp_path / "trained")]) == 0
    assert "never trained itself" not in " ".join((tmp_path / "trained" / "README.md").read_text().split())


def expected_loss(subnet: SubNet) -> float:
    return 2.0 + 1 / subnet.depth + 1 / subnet["g"] + 8 / subnet["f"]


def run_with_losses(folder):
    """A table whose losses are what the interpolation is made of, so it is exact."""
    rows = made_up_table()
    for row in rows:
        row.metrics["loss"] = expected_loss(SubNet.parse(row.subnet))
    run = ModelDir.find(trained_run(folder))
    run.add_measured(rows, None)
    return run


def test_the_best_by_interpolation_within_the_budget_are_proposed(tmp_path):
    family = load(run_with_losses(tmp_path).root)
    new = [subnet for subnet in family.cuttable if subnet not in family]
    costs = costs_of(new, LLAMA, family.config, ROW_TOKENS)
    for budget in sorted(cost.parameters for cost in costs.values())[::3]:
        within = [subnet for subnet in new if costs[subnet].parameters <= budget]
        found = propose(family, family.where.read(), Budgets(max_params=budget))
        assert found == sorted(within, key=expected_loss)[:PROPOSED_AT_MOST]
    gap = 0.6
    close = [subnet for subnet in new if expected_loss(subnet) - expected_loss(family.space.full) <= gap]
    found = propose(family, family.where.read(), Budgets(max_loss_gap=gap))
    assert found == sorted(close, key=lambda subnet: costs[subnet].parameters)[:PROPOSED_AT_MOST]


def speed(name: str) -> Speed:
    ms = 1.0 + SubNet.parse(name).depth
    return Speed(1, 512, ms, 0.1, ms, 0.1, memory_bytes=1000, cache_bytes=100)


def test_select_any_evaluates_adds_and_selects(tmp_path, capsys):
    path = run_file(tmp_path)
    assert main(["prepare", str(path), "--json"]) == 0
    prepared = json.loads(capsys.readouterr().out)
    run = trained_run(tmp_path / "run", tokens_dir=prepared["tokens_dir"], vocab_size=prepared["vocab_size"])
    assert main(["eval", str(run)]) == 0
    trained = {row.subnet: row for row in ModelDir.find(run).table()}
    capsys.readouterr()
    assert main(["select", str(run), "--max-params", "250k", "--any"]) == 0
    printed = capsys.readouterr()
    where = ModelDir.find(run)
    rows = {row.subnet: row for row in where.table()}
    added = {name: row for name, row in rows.items() if name not in trained}
    assert 0 < len(added) <= PROPOSED_AT_MOST
    assert all(not row.is_trained and row.num_targets == 8 * 16 and math.isfinite(row.loss) for row in added.values())
    assert {name: row for name, row in rows.items() if name in trained} == trained
    best = min((row for row in rows.values() if row.parameters <= 250e3), key=lambda row: row.loss)
    assert printed.out == f"{best.subnet}\n"
    assert [row.parameters for row in where.table()] == sorted(row.parameters for row in rows.values())
    assert len(where.read().space) == 27
    assert main(["eval", str(run), "--rows", "4"]) == 0, "all rows of the table are measured again"
    shown = capsys.readouterr().out
    assert shown.count(" *") >= len(added)
    assert "* never trained" in shown
    few = list(trained)[:4]
    where.add_speeds({name: [speed(name)] for name in few}, HERE)
    latency = ["select", str(run), "--max-latency-ms", "4.5", "--any"]
    assert main(latency) == 2
    assert (
        "measured speeds of 4 sub-networks, too few to predict others. Run `sorted-ds eval" in capsys.readouterr().err
    )
    where.add_speeds({name: [speed(name)] for name in trained}, HERE)
    assert main(latency) == 0
    chosen = {row.subnet: row for row in where.table()}[capsys.readouterr().out.strip()]
    assert all(row.speed(Setting()) is not None for row in where.table())
    assert chosen.speed(Setting()).decode_ms <= 4.5
    assert [row.speed(Setting()).is_measured for row in where.table()] == [row.is_trained for row in where.table()]
