"""Every mode is exact or refused: a cover of all factors against plain single-process PyTorch, on 1 to 4 ranks.

One launch a number of ranks, engines rebuilt inside. The whole product: `python -m benchmarks.matrix`.
"""

import json

import pytest

from sorted_ds.base.errors import UserError
from sorted_ds.engine.modes import check_modes, complete_config, is_bf16, is_offloaded
from sorted_ds.engine.optimizers import check_implementation
from tests import cover, exactness
from tests.cover import FACTORS, NUM_STEPS, Mode
from tests.exactness import Case
from tests.spawn import ROOT, on_ranks

ALLOWED = [setting for setting in cover.settings() if cover.is_allowed(setting)]
COVER = cover.cover(ALLOWED)
MODES = [cover.mode_of(setting) for setting in COVER]
SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))
BF16 = [mode for mode in MODES if mode.case.precision == "bf16"]


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


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[Mode, dict]:
    """What the engine made of each mode, and of the twins of those in bf16."""
    found = {}
    for num_ranks in FACTORS["num_ranks"]:
        modes = {mode for mode in (*MODES, *(mode.twin for mode in BF16)) if mode.num_ranks == num_ranks}
        cases = sorted({mode.case for mode in modes}, key=lambda case: case.name)
        folder = tmp_path_factory.mktemp(f"{num_ranks}_ranks")
        results = on_ranks(num_ranks, exactness.run_cases, cases, NUM_STEPS, folder=folder)
        found.update({mode: results[mode.case.name] for mode in modes})
    return found


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_a_mode_trains_as_plain_pytorch_does(trained, mode):
    assert "before" in trained[mode], "or the update would not be compared"
    error = cover.error(trained[mode], mode)
    assert not cover.exceeds(error, cover.bounds(mode)), error


@pytest.mark.parametrize("mode", BF16, ids=lambda mode: mode.name)
def test_bf16_is_as_close_as_a_static_network_in_the_same_mode(trained, mode):
    active, static = cover.error(trained[mode], mode), cover.error(trained[mode.twin], mode.twin)
    assert not cover.exceeds_static(active, static), (active, static)


def test_what_is_not_a_number_exceeds_every_bound():
    nan = float("nan")
    right = cover.expected(MODES[0])
    broken = {name: value.clone() for name, value in right["weights"].items()}
    list(broken.values())[-1].view(-1)[0] = nan
    error = cover.error({**right, "weights": broken}, MODES[0])
    assert error.weights != error.weights
    assert cover.exceeds(error, cover.bounds(MODES[0]))
    assert not cover.exceeds(cover.error(right, MODES[0]), cover.bounds(MODES[0]))


def test_offloaded_and_partitioned_weights_were_gathered_and_released(trained):
    for mode in MODES:
        if mode.case.stage == 3 and mode.num_ranks > 1:
            assert trained[mode]["gathers"] > 50
            assert trained[mode]["released"]
