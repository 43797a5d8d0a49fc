"""Speeds: runs compute what a plain model computes, memory is the exported model's, predictions tell their error."""

import copy
import itertools
import json
from unittest import mock

import pytest
import torch

from sorted_ds import UserError, extract, load
from sorted_ds.commands.cli import main
from sorted_ds.deploy import measure as measure_module
from sorted_ds.deploy.measure import DECODED, measure, num_runs, run_once, settings_of
from sorted_ds.deploy.model_dir import ModelDir
from sorted_ds.deploy.predict import errors, fit, num_needed
from sorted_ds.deploy.speed import Setting
from sorted_ds.space import SubNet
from tests.families import SPACE, VARIANTS, tiny_model, tokens
from tests.runs import run_file
from tests.toys import ToyConfig, ToyFamily, registered
from tests.trained import load_nested, measured_run, trained_run

HEAD = 12
"""The channels of a head of the tiny llama."""


@pytest.fixture
def quick(monkeypatch):
    """Two rounds of one decoded token."""
    monkeypatch.setattr(measure_module, "ROUNDS", 2)
    monkeypatch.setattr(measure_module, "DECODED", 1)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_decoded_token_attends_to_the_whole_context(variant):
    """Also with sliding layers: every one starts with the cache that the prompt left."""
    model, ids, seen = tiny_model(variant).eval(), tokens(rows=2, length=20), []
    model.register_forward_hook(lambda module, args, out: seen.append(out.logits))
    run = run_once(model, ids)
    prefill, *decoded = seen
    expected = model(ids, use_cache=False).logits
    assert len(decoded) == len(run.decode_ms) == DECODED > 1
    assert prefill.shape[1] == 1
    for found, logits in ((prefill, expected[:, -2:-1]), *((logits, expected[:, -1:]) for logits in decoded)):
        assert (found - logits).abs().max() <= 1e-5 * expected.abs().max()
    assert run.prefill_ms > 0
    assert min(run.decode_ms) > 0


@pytest.mark.parametrize("name", ["d1-g1-f32", "d2-g3-f80", "d4-g4-f112"])
def test_memory_is_that_of_the_exported_model_and_its_cache(name, tmp_path):
    family = load(trained_run(tmp_path))
    run = run_once(family[name], tokens(rows=3, length=40))
    alone = extract(load_nested(tmp_path), name)
    weights = sum(tensor.nbytes for tensor in (*alone.parameters(), *alone.buffers()))
    config = alone.config
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * HEAD * 4 * 3 * 40
    assert (run.memory_bytes, run.cache_bytes) == (weights + cache, cache)


def test_every_round_runs_every_sub_network_once_in_another_order(tmp_path, quick):
    family, order = load(trained_run(tmp_path)), []
    names = {id(family[subnet]): subnet for subnet in SPACE}
    run = measure_module.run_once

    def recorded(model, ids):
        order.append(names[id(model)])
        return run(model, ids)

    with mock.patch.object(measure_module, "run_once", recorded):
        measure(family, list(SPACE), [Setting(1, 16)])
    rounds = [order[start : start + len(SPACE)] for start in range(0, len(order), len(SPACE))]
    assert [set(each) for each in rounds] == [set(SPACE)] * 3
    assert len(set(map(tuple, rounds))) == 3
    assert len(order) == num_runs(len(SPACE), [Setting(1, 16)])


def test_of_a_large_space_a_part_is_measured_and_the_rest_predicted(tmp_path, quick, monkeypatch):
    """Memory is linear in what the prediction is made of, so it is predicted to the byte."""
    family, setting = load(trained_run(tmp_path)), Setting(2, 16)
    whole = measure(family, list(family), [setting])
    assert all(speeds[0].is_measured for speeds in whole.values())
    monkeypatch.setattr(measure_module, "MEASURED_AT_MOST", 12)
    part = measure(family, list(family), [setting])
    guessed = {subnet: speeds[0] for subnet, speeds in part.items() if not speeds[0].is_measured}
    assert len(guessed) == len(family) - 12
    for subnet, speed in guessed.items():
        assert speed.memory_bytes == whole[subnet][0].memory_bytes
        assert speed.cache_bytes == whole[subnet][0].cache_bytes
        assert speed.decode_spread_ms is None
        assert 0 <= speed.median_error <= speed.largest_error
    assert part[family.space.full][0].is_measured
    assert part[family.space.smallest][0].is_measured


def test_a_prediction_is_exact_on_what_is_linear_and_its_errors_are_of_values_it_did_not_see():
    def cost(subnet):
        return 3.0 + subnet.depth * (2.0 + 0.5 * subnet["g"] + 0.01 * subnet["f"])

    seen = {subnet: cost(subnet) for subnet in SPACE if subnet["f"] != 80}
    found = fit(seen)
    for subnet in [*SPACE, SubNet.parse("d3-g2-f100")]:
        assert found(subnet) == pytest.approx(cost(subnet), rel=1e-9)
    assert max(errors(seen)) < 1e-9
    odd = SubNet.parse("d2-g3-f112")
    doubled = {**seen, odd: 2 * cost(odd)}
    assert errors(doubled)[list(doubled).index(odd)] == pytest.approx(0.5)
    least = dict(itertools.islice(seen.items(), num_needed(odd)))
    assert len(errors(least)) == 5


def test_no_part_of_a_cost_is_predicted_to_be_negative():
    falling = {subnet: 100.0 - 20 * subnet.depth for subnet in SPACE}
    found = fit(falling)
    assert 20 < found(SPACE.smallest) == found(SPACE.full) < 80


def rows_of(run) -> list:
    return list(ModelDir.find(run).table())


def test_eval_measure_adds_to_the_table_and_does_not_measure_losses_again(tmp_path, quick, capsys):
    run = measured_run(tmp_path, dtype=torch.bfloat16)  # without prepared data, so a loss could not be measured
    before = rows_of(run)
    assert main(["eval", str(run), "--measure", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    rows = rows_of(run)
    assert [row.metrics for row in rows] == [row.metrics for row in before]
    assert {row.speeds[0].setting for row in rows} == {Setting(1, 64)}, "512 is beyond max_position_embeddings"
    assert "batch 1, context 64" in printed.out
    assert "decode ms" in printed.out
    assert "…" not in printed.out
    assert max(map(len, printed.out.splitlines()[: len(rows)])) <= 120
    assert printed.err.count("measuring warm-up\nmeasuring round 1") == 1
    where = ModelDir.find(run).read().measured_on
    assert (where.dtype, where.num_threads, where.torch) == ("bfloat16", torch.get_num_threads(), torch.__version__)
    assert where.device
    assert str(where) in printed.out
    assert main(["eval", str(run), "--measure", "--batch", "1,2", "--context", "8,16", "--subnets", "d1-g1-f32"]) == 0
    rows = {row.subnet: row for row in rows_of(run)}
    settings = [speed.setting for speed in rows["d1-g1-f32"].speeds]
    assert settings == [Setting(1, 8), Setting(1, 16), Setting(1, 64), Setting(2, 8), Setting(2, 16)]
    assert len(rows["d2-g1-f32"].speeds) == 1


def test_a_table_of_speeds_is_selected_from_as_its_error_says(tmp_path, quick, capsys):
    folder = measured_run(tmp_path)
    run = str(folder)
    assert main(["select", run, "--max-latency-ms", "1000"]) == 2
    assert f"Run `sorted-ds eval {run} --measure` first." in capsys.readouterr().err
    assert main(["eval", run, "--measure"]) == 0
    capsys.readouterr()
    assert main(["select", run, "--max-latency-ms", "1000"]) == 2
    assert "but for batch 1, context 64. Name one of these with --batch and --context" in capsys.readouterr().err
    assert main(["select", run, "--max-latency-ms", "1000", "--context", "64", "--max-memory-gib", "1"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "d4-g4-f112\n"
    assert "\nspeeds: " in printed.err
    family = load(run)
    assert family.best(max_latency_ms=1000, max_memory_gib=1, context=64) is family[family.space.full]
    found = family.best(max_memory_gib=rows_of(folder)[0].speeds[0].memory_gib, context=64)
    assert found is family["d1-g1-f32"]
    assert main(["select", run, "--max-params", "1M", "--batch", "1"]) == 2
    assert "Add --max-latency-ms or --max-memory-gib." in capsys.readouterr().err


def test_what_has_no_loss_yet_is_evaluated_first(tmp_path, quick, capsys):
    path = run_file(tmp_path)
    assert main(["prepare", str(path), "--json"]) == 0
    prepared = json.loads(capsys.readouterr().out)
    run = trained_run(tmp_path / "run", tokens_dir=prepared["tokens_dir"], vocab_size=prepared["vocab_size"])
    one = ["eval", str(run), "--measure", "--subnets", "d1-g1-f32", "--context", "8", "--json"]
    assert main(one) == 0
    (row,) = rows_of(run)
    assert len(row.speeds) == 1
    capsys.readouterr()
    assert main(one) == 0
    assert "evaluating" not in capsys.readouterr().err
    assert main([*one, "--rows", "8"]) == 0
    assert "evaluating d1-g1-f32" in capsys.readouterr().err


def test_what_cannot_be_measured_is_one_line(tmp_path, capsys):
    run = str(measured_run(tmp_path))
    capsys.readouterr()
    for arguments, message in (
        (["--measure", "--context", "65"], "--context 65 cannot be measured. Name at least 2 and at most"),
        (["--measure", "--context", "16,1"], "--context 1 cannot be measured"),
        (["--context", "16"], "--batch and --context say what --measure measures. Add --measure."),
        (["--batch", "8"], "Add --measure."),
    ):
        assert main(["eval", run, *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["eval", run, "--measure", "--batch", "0"])


def test_a_family_without_a_cache_is_one_line(tmp_path):
    family = copy.copy(load(measured_run(tmp_path)))
    with registered():
        family.architecture, family.config = ToyFamily(), ToyConfig()
        with pytest.raises(UserError, match=r"has no key/value cache, so it does not decode\. Leave out --measure"):
            settings_of(family, (1,), ())
