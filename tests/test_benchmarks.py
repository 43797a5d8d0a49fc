"""The benchmarks import, and what they compute beside times is right. Speeds are no tests."""

import importlib
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import pytest

from benchmarks import kept, matrix, spaces, step_time, subnets, whole_steps
from benchmarks.common import SIZES, Setting, interval, nested_llama, training_tflops
from sorted_ds.engine.modes import check_modes
from sorted_ds.nested import costs_of
from tests import cover
from tests.spawn import ROOT


def coverage(n: int, k: int) -> float:
    """How often the interval from the k-th smallest to the k-th largest of n values holds the true median."""
    return 1 - 2 * sum(math.comb(n, heads) for heads in range(k)) / 2**n


@pytest.mark.parametrize("n", [6, 9, 10, 25, 40, 101])
def test_the_interval_of_a_median_is_the_narrowest_that_holds_95_percent(n):
    found = interval([float(value) for value in reversed(range(n))])
    k = int(found.low) + 1
    assert found.high == n - k
    assert coverage(n, k) >= 0.95 > coverage(n, k + 1)
    assert found.median == (n - 1) / 2


def test_few_values_have_their_extremes_as_interval():
    assert str(interval([2.0, 1.0, 4.0])) == "2.000 (1.000-4.000)"


@pytest.mark.parametrize("size", [SIZES["small"], SIZES["middle"]], ids=["small", "middle"])
def test_spaces_hold_as_many_sub_networks_as_they_say_and_the_common_one(size):
    for number, space in spaces.spaces(size).items():
        assert len(space) == number
        assert spaces.common(size) in space
        assert space.full == size.space().full


def test_every_timed_sub_network_is_in_its_space_and_the_last_is_the_full_one():
    for size in SIZES.values():
        assert all(size.of(*quarters) in size.space() for quarters in subnets.QUARTERS)
        assert size.of(*subnets.QUARTERS[-1]) == size.space().full


def test_training_costs_three_times_the_forward_passs_flops():
    model = nested_llama(SIZES["tiny"])
    cost = costs_of(model.space, model.family, model.config, SIZES["tiny"].row_tokens)[model.space.full]
    assert training_tflops(cost, tokens=100, seconds=2.0) == 3 * cost.flops_per_token * 100 / 2.0 / 1e12


def test_peers_have_the_settings_of_the_engine():
    for stage in (0, 1, 2, 3):
        setting = Setting(SIZES["tiny"], stage, bf16=True)
        check_modes(setting.engine_keys(), "benchmark")
        keys = whole_steps.peer_keys(setting, accumulation=4, num_ranks=2)
        assert {key: keys[key] for key in setting.engine_keys()} == setting.engine_keys()
        assert keys["train_batch_size"] == 4 * 2 * setting.size.rows


def test_the_command_line_has_a_help(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["step_time", "--help"])
    with pytest.raises(SystemExit) as stopped:
        step_time.arguments()
    assert stopped.value.code == 0
    assert "--peak-tflops" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_imports(path):
    importlib.import_module(f"benchmarks.{path.stem}")


MODES = [cover.mode_of(setting) for setting in cover.allowed()]


def test_the_matrixs_page_is_of_its_committed_rows_and_none_is_outside():
    """The matrix takes hours, so a part of it may be committed. Its versions are those of then."""
    committed = matrix.Matrix("cpu")
    versions = json.loads(committed.file.read_text().splitlines()[0])
    with mock.patch.object(matrix, "versions", return_value=versions):
        found = matrix.known(committed)
        assert committed.summary.read_text() == matrix.page(committed, MODES, found)
    assert found.keys() <= {name for mode in MODES for name in (mode.name, mode.twin.name)}
    assert not [mode.name for mode in MODES if mode.name in found and matrix.is_outside(mode, found)]


def test_modes_come_so_that_four_settings_meet_early():
    settings = cover.allowed()
    ordered = cover.in_order(settings)
    assert len(ordered) == len(settings) == len({tuple(setting.items()) for setting in ordered})
    assert [cover.strength(ordered[:number], settings) for number in (65, 150, 240)] == [2, 3, 4]


def at_bounds(mode: cover.Mode) -> dict[str, cover.Error]:
    """Errors of a mode and its twin that are just allowed."""
    error = replace(cover.bounds(mode), rms=cover.STATIC_BOUND)
    return {mode.twin.name: replace(error, rms=1.0), mode.name: error}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_mode_beyond_a_bound_is_outside(precision, optimizer):
    mode = next(m for m in MODES if (m.case.precision, m.case.optimizer) == (precision, optimizer))
    found = at_bounds(mode)
    assert not matrix.is_outside(mode, found)
    for kind, bound in asdict(cover.bounds(mode)).items():
        for value in (1.01 * bound or 1e-9, math.nan) if bound < math.inf else (math.nan,):
            assert matrix.is_outside(mode, {**found, mode.name: replace(found[mode.name], **{kind: value})}), kind


def test_a_mode_further_from_the_reference_than_its_twin_is_outside():
    mode = next(m for m in MODES if m.case.precision == "bf16" and not m.case.static)
    found = at_bounds(mode)
    further = replace(found[mode.name], rms=1.01 * cover.STATIC_BOUND)
    assert matrix.is_outside(mode, {**found, mode.name: further})


def sampled(folder: Path, error: cover.Error | None = None, code: str = "ab") -> tuple[str, list[str]]:
    """What a sample of the matrix says, if every mode has this error, and the modes that it measured."""
    names: list[str] = []

    def measure(modes, device):
        names.extend(mode.name for mode in modes)
        return {mode.name: error or replace(at_bounds(mode)[mode.name], rms=1.0) for mode in modes}

    with mock.patch.multiple(matrix, measure=measure, code_digest=lambda: code):
        return matrix.sample(matrix.Matrix("cpu", folder), MODES[:100], minutes=1), names


def test_a_sample_of_the_matrix_changes_with_the_code_and_goes_on_where_it_stopped(tmp_path):
    told, first = sampled(tmp_path)
    assert told == "100 of 100 modes, 0 outside their bounds"
    assert sampled(tmp_path)[1] == []
    other = sampled(tmp_path, code="cd")[1]
    assert sorted(other) == sorted(first)
    assert other != first


def test_a_sample_with_a_mode_outside_its_bounds_or_without_any_fails(tmp_path):
    far = cover.Error(1.0, 1.0, 1.0, 1.0, 1.0)
    with pytest.raises(SystemExit, match="100 of 100 modes, 100 outside their bounds\n"):
        sampled(tmp_path, far)
    with pytest.raises(SystemExit, match="0 of 100 modes"), mock.patch.object(matrix, "run"):
        sampled(tmp_path / "none")


def test_what_other_code_measured_is_refused_and_not_thrown_away(tmp_path):
    file, made_by = tmp_path / "rows.jsonl", {"torch": "2.13.0", "code": "ab"}
    assert kept.read_rows(file, made_by) == []
    kept.append_rows(file, [{"name": "a"}])
    assert kept.read_rows(file, made_by) == [{"name": "a"}]
    with pytest.raises(SystemExit, match=r"measured with torch = 2\.13\.0, here 2\.14\.0\..* --anew"):
        kept.read_rows(file, {**made_by, "torch": "2.14.0"})
    assert kept.read_rows(file, made_by) == [{"name": "a"}]
