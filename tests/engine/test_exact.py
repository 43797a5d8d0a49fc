"""Each part of what makes the engine exact: with it, training is plain single-process PyTorch's; without, it is not.

All modes together: tests/engine/test_cover.py. Two gloo ranks, one launch for each tier, engines rebuilt inside. The
schedule uses layers and channels early but not last, last but not first, and not at all in a step; ranks have unequal
numbers of targets (tests/exactness.py).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from tests import exactness
from tests.cover import FP32_BOUNDS
from tests.exactness import Case
from tests.spawn import on_ranks
from tests.tiers import Tiers

NUM_STEPS = len(exactness.SCHEDULE)
STAGES = (0, 1, 2, 3)

TOLERANCE = {optimizer: bound.weights for optimizer, bound in FP32_BOUNDS.items()}
BROKEN = 1e-3

FP32 = [Case(stage, "fp32", optimizer) for stage in STAGES for optimizer in ("adamw", "sgd")]
MORE = [
    Case(3, tied=True, checkpointing=True, sub_group_size=1500, clip_norm=0.0),
    Case(3, default_thresholds=True),
    Case(3, offload=True, overlap=True, prefetch=2_000, sub_group_size=1500, evaluate_between=True),
    Case(3, offload=True, offload_param=True, pin_memory=True),
]
STILL_MORE = [
    *(Case(3, prefetch=size, overlap=overlap) for size in (2_000, 100_000) for overlap in (False, True)),
    *(Case(stage, offload=True, pin_memory=True) for stage in (1, 2)),
]
BF16 = [Case(stage, "bf16", "sgd") for stage in STAGES]
BF16_OFFLOADED = [Case(stage, "bf16", "sgd", offload=True) for stage in (1, 2, 3)]
STALE = [
    Case(3, without="clean_accumulators"),
    Case(3, optimizer="sgd", without="both"),
    Case(2, offload=True, without="clean_accumulators"),
    Case(1, offload=True, without="both"),
]
STILL_STALE = [
    Case(stage, optimizer=optimizer, offload=offload, without=part)
    for stage, offload, optimizers in (
        (3, False, ("adamw", "sgd")),
        (3, True, ("adamw", "sgd")),
        (2, True, ("adamw", "sgd")),
        (1, True, ("adamw",)),
    )
    for optimizer in optimizers
    for part in ("clean_accumulators", "both")
]
STILL_STALE += [Case(3, offload=True, offload_param=True, without="clean_accumulators")]
STILL_STALE = [case for case in STILL_STALE if case not in STALE]
MEAN_LOSS = [Case(stage, without="summed_loss") for stage in STAGES]
REFUSED = [Case(1, overlap=True, without="own_accumulation")]
CLEANED_ONLY = [Case(3, without="own_accumulation")]
REPORTS = [Case(stage, reports=True) for stage in STAGES]
"""Last: DeepSpeed keeps its log of communication switched on."""

FIRST_TIER = [*FP32, *MORE, BF16[3], *STALE, MEAN_LOSS[2], MEAN_LOSS[3], *REFUSED, *CLEANED_ONLY, REPORTS[3]]
ALL = [*FP32, *MORE, *STILL_MORE, *BF16, *BF16_OFFLOADED, *STALE, *STILL_STALE, *MEAN_LOSS, *REFUSED, *CLEANED_ONLY]
ALL += REPORTS
TIERS = Tiers(ALL, FIRST_TIER)
each = TIERS.each


def train(cases: list[Case], folder: Path) -> dict[str, dict]:
    return on_ranks(2, exactness.run_cases, cases, NUM_STEPS, folder=folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[[Case], dict]:
    """Returns a function from a case to what two ranks made of it."""
    results = TIERS.started(train, tmp_path_factory)
    return lambda case: results(case)[case.name]


@cache
def expected(case: Case, skip_unused: bool = False) -> dict:
    return exactness.reference_weights(case, 2, NUM_STEPS, skip_unused)


def error(result: dict, case: Case) -> float:
    return exactness.largest_difference(result["weights"], expected(case)["weights"])


@each(FP32 + MORE + STILL_MORE + REPORTS)
def test_weights_equal_the_reference(trained, case):
    assert error(trained(case), case) <= TOLERANCE[case.optimizer]


@each(FP32 + MORE + STILL_MORE + REPORTS)
def test_gradient_norms_equal_the_reference(trained, case):
    assert trained(case)["norms"] == pytest.approx(expected(case)["norms"], rel=1e-5)


@each(BF16_OFFLOADED)
def test_offload_leaves_bf16_where_it_was(trained, case):
    kept = trained(replace(case, offload=False))
    assert exactness.largest_difference(kept["weights"], trained(case)["weights"]) <= 1e-6


@each(STALE + STILL_STALE)
def test_stage_3_and_offload_without_clean_accumulators_are_wrong(trained, case):
    assert error(trained(case), case) > BROKEN


@each(MEAN_LOSS)
def test_the_usual_mean_loss_per_micro_batch_is_wrong(trained, case):
    assert error(trained(case), case) > BROKEN


@each(REFUSED)
def test_a_refused_mode_is_wrong_indeed(trained, case):
    assert error(trained(case), case) > BROKEN


@each(CLEANED_ONLY)
def test_stage_3_needs_only_the_clean_accumulators_while_nothing_is_offloaded(trained, case):
    assert error(trained(case), case) <= TOLERANCE[case.optimizer]


@each([FP32[0], FP32[-2]])
def test_unused_parameters_get_a_zero_gradient_not_none(trained, case):
    skipped = expected(case, skip_unused=True)["weights"]
    assert exactness.largest_difference(trained(case)["weights"], skipped) > BROKEN


@each(case for case in FP32 + BF16 if case.stage < 3)
def test_stages_under_3_use_joined_blocks(trained, case):
    assert trained(case)["laid_out"]


@each(case for case in FP32 + BF16 if case.stage == 3)
def test_stage_3_gathers_and_releases(trained, case):
    assert trained(case)["gathers"] > 100
    assert trained(case)["released"]


@each(case for case in FP32 + BF16 if case.stage >= 2)
def test_stages_2_and_3_reduce_in_mid_backward(trained, case):
    assert trained(case)["reduces_in_backward"] > 10


def print_table(folder: Path) -> None:
    """Stage x precision x optimizer, and each part of the fix off: `python -m benchmarks.exactness`."""
    trained = train(ALL, folder)
    for case in ALL:
        print(f"{case.name:75s} {error(trained[case.name], case):.1e}")
