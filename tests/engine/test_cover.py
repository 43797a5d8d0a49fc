"""Every mode is exact or refused: a cover of all factors against plain single-process PyTorch, on 1 to 4 ranks.

One launch a number of ranks, engines rebuilt inside. The first tier runs the core of the cover on 1 and 2 ranks, CI
that on 3 and 4 too, and the second tier all of it. The whole product: `python -m benchmarks.matrix`.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from sorted_ds.base.errors import UserError
from sorted_ds.engine.modes import check_modes, complete_config, is_bf16, is_offloaded
from sorted_ds.engine.optimizers import check_implementation
from tests import cover, exactness
from tests.cover import FACTORS, NUM_STEPS, Mode
from tests.exactness import Case
from tests.spawn import ROOT, on_ranks
from tests.tiers import Tiers

ALLOWED = cover.allowed()
COVER = cover.cover(ALLOWED)
MODES = [cover.mode_of(setting) for setting in COVER]
CORE = [cover.mode_of(setting) for setting in cover.cover(COVER, cover.pairs)]
"""What the first tier runs, those with more ranks than two cores run at once in CI only."""
SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))
TIERS = Tiers(MODES, [mode for mode in CORE if mode.num_ranks <= 2], in_ci=CORE)
each = TIERS.each


def in_bf16(modes: Iterable[Mode]) -> list[Mode]:
    return [mode for mode in modes if mode.case.precision == "bf16"]


def test_the_core_has_every_pair():
    settings = cover.cover(COVER, cover.pairs)
    assert set().union(*map(cover.pairs, settings)) == set().union(*map(cover.pairs, ALLOWED))
    assert 20 <= len(CORE) <= 30


def test_the_cover_has_every_pair():
    covered = set().union(*map(cover.wanted, COVER))
    for setting in ALLOWED:
        assert cover.wanted(setting) <= covered
    assert 60 <= len(COVER) <= 90


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_json_is_a_mode_of_the_cover(path):
    """The JSON is compared as the engine completes it. A key that no mode of the cover sets would not be proven."""
    config = json.loads(path.read_text())
    assert config.keys() <= {"zero_optimization", "bf16"}
    zero = complete_config(config, 1, 1, 0.0)["zero_optimization"]
    offloads = [name for key, name in (("offload_optimizer", "optimizer"), ("offload_param", "weights")) if key in zero]
    assert zero.keys() <= {"stage", "overlap_comm", "offload_optimizer", "offload_param"}
    assert all(zero[key] == {"device": "cpu"} for key in zero if key.startswith("offload"))
    mode = {
        "stage": zero["stage"],
        "overlap": zero["overlap_comm"],
        "offload": " and ".join(offloads),
        "precision": "bf16" if is_bf16(config) else "fp32",
    }
    assert any(mode.items() <= setting.items() for setting in COVER)


def test_no_two_shipped_jsons_are_one_mode():
    modes = [json.dumps(complete_config(json.loads(path.read_text()), 1, 1, 0.0), sort_keys=True) for path in SHIPPED]
    assert len(set(modes)) == len(SHIPPED) >= 11


def check(case: Case) -> None:
    """What the engine refuses at the start."""
    check_modes(case.deepspeed(), "ds.json")
    check_implementation(case.optim, is_offloaded(case.deepspeed()))


def test_what_is_not_allowed_is_refused_and_nothing_else():
    for setting in cover.settings():
        case = cover.mode_of(setting).case
        if cover.is_allowed(setting):
            check(case)
            continue
        with pytest.raises(UserError, match=r"Set |or use stage|leave it out"):
            check(case)


def train(modes: Sequence[Mode], folder: Path) -> dict[Mode, dict]:
    """Returns what the engine made of each mode, and of the twins of those in bf16."""
    found = {}
    for num_ranks in FACTORS["num_ranks"]:
        these = {mode for mode in (*modes, *(mode.twin for mode in in_bf16(modes))) if mode.num_ranks == num_ranks}
        cases = sorted({mode.case for mode in these}, key=lambda case: case.name)
        results = on_ranks(num_ranks, exactness.run_cases, cases, NUM_STEPS, folder=folder / str(num_ranks))
        found.update({mode: results[mode.case.name] for mode in these})
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[[Mode], dict[Mode, dict]]:
    """Returns a function from a mode to the results of all modes of its tier."""
    return TIERS.started(train, tmp_path_factory)


@each(MODES)
def test_a_mode_trains_as_plain_pytorch_does(trained, case):
    result = trained(case)[case]
    assert "before" in result, "or the update would not be compared"
    error = cover.error(result, case)
    assert not cover.exceeds(error, cover.bounds(case)), error


@each(in_bf16(MODES))
def test_bf16_is_as_close_as_a_static_network_in_the_same_mode(trained, case):
    results = trained(case)
    active, static = cover.error(results[case], case), cover.error(results[case.twin], case.twin)
    assert not cover.exceeds_static(active, static), (active, static)


@each(mode for mode in MODES if mode.case.stage == 3 and mode.num_ranks > 1)
def test_offloaded_and_partitioned_weights_were_gathered_and_released(trained, case):
    result = trained(case)[case]
    assert result["gathers"] > 50
    assert result["released"]


def test_what_is_not_a_number_exceeds_every_bound():
    nan = float("nan")
    right = cover.expected(MODES[0])
    broken = {name: value.clone() for name, value in right["weights"].items()}
    list(broken.values())[-1].view(-1)[0] = nan
    error = cover.error({**right, "weights": broken}, MODES[0])
    assert error.weights != error.weights
    assert cover.exceeds(error, cover.bounds(MODES[0]))
    assert not cover.exceeds(cover.error(right, MODES[0]), cover.bounds(MODES[0]))
