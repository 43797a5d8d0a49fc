"""Each part of what makes the engine exact: with it, training is plain single-process PyTorch's; without, it is not.

All modes together: tests/engine/test_cover.py. Two gloo ranks, one launch, engines rebuilt inside. The schedule uses
layers and channels early but not last, last but not first, and not at all in a step; ranks have unequal numbers of
targets (tests/exactness.py).
"""

from functools import cache
from pathlib import Path

import pytest

from tests import exactness
from tests.cover import FP32_BOUNDS
from tests.exactness import Case
from tests.spawn import on_ranks

NUM_STEPS = len(exactness.SCHEDULE)
STAGES = (0, 1, 2, 3)

TOLERANCE = {optimizer: bound.weights for optimizer, bound in FP32_BOUNDS.items()}
BROKEN = 1e-3

FP32 = [Case(stage, "fp32", optimizer) for stage in STAGES for optimizer in ("adamw", "sgd")]
MORE = [
    Case(3, tied=True, checkpointing=True, sub_group_size=1500, clip_norm=0.0),
    Case(3, default_thresholds=True),
    *(Case(3, prefetch=size, overlap=overlap) for size in (2_000, 100_000) for overlap in (False, True)),
    Case(3, offload=True, overlap=True, prefetch=2_000, sub_group_size=1500, evaluate_between=True),
    *(Case(stage, offload=True, pin_memory=True) for stage in (1, 2)),
    Case(3, offload=True, offload_param=True, pin_memory=True),
]
BF16 = [Case(stage, "bf16", "sgd") for stage in STAGES]
BF16 += [Case(stage, "bf16", "sgd", offload=True) for stage in (1, 2, 3)]
STALE = [
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
STALE += [Case(3, offload=True, offload_param=True, without="clean_accumulators")]
MEAN_LOSS = [Case(stage, without="summed_loss") for stage in STAGES]
REFUSED = [Case(1, overlap=True, without="own_accumulation")]
CLEANED_ONLY = [Case(3, without="own_accumulation")]
REPORTS = [Case(stage, reports=True) for stage in STAGES]
"""Last: DeepSpeed keeps its log of communication switched on."""

ALL = [*FP32, *MORE, *BF16, *STALE, *MEAN_LOSS, *REFUSED, *CLEANED_ONLY, *REPORTS]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Case name -> what two ranks made of it."""
    return on_ranks(2, exactness.run_cases, ALL, NUM_STEPS, folder=tmp_path_factory.mktemp("two_ranks"))


@cache
def expected(case: Case, skip_unused: bool = False) -> dict:
    return exactness.reference_weights(case, 2, NUM_STEPS, skip_unused)


def error(trained: dict, case: Case) -> float:
    return exactness.largest_difference(trained[case.name]["weights"], expected(case)["weights"])


def names(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", FP32 + MORE + REPORTS, ids=names)
def test_weights_equal_the_reference(trained, case):
    assert error(trained, case) <= TOLERANCE[case.optimizer]


@pytest.mark.parametrize("case", FP32 + MORE + REPORTS, ids=names)
def test_gradient_norms_equal_the_reference(trained, case):
    assert trained[case.name]["norms"] == pytest.approx(expected(case)["norms"], rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_leaves_bf16_where_it_was(trained, stage):
    here, there = (trained[Case(stage, "bf16", "sgd", offload=offload).name] for offload in (False, True))
    assert exactness.largest_difference(here["weights"], there["weights"]) <= 1e-6


@pytest.mark.parametrize("case", STALE, ids=names)
def test_stage_3_and_offload_without_clean_accumulators_are_wrong(trained, case):
    assert error(trained, case) > BROKEN


@pytest.mark.parametrize("case", MEAN_LOSS, ids=names)
def test_the_usual_mean_loss_per_micro_batch_is_wrong(trained, case):
    assert error(trained, case) > BROKEN


@pytest.mark.parametrize("case", REFUSED, ids=names)
def test_a_refused_mode_is_wrong_indeed(trained, case):
    assert error(trained, case) > BROKEN


@pytest.mark.parametrize("case", CLEANED_ONLY, ids=names)
def test_stage_3_needs_only_the_clean_accumulators_while_nothing_is_offloaded(trained, case):
    assert error(trained, case) <= TOLERANCE[case.optimizer]


@pytest.mark.parametrize("case", [FP32[0], FP32[-2]], ids=names)
def test_unused_parameters_get_a_zero_gradient_not_none(trained, case):
    skipped = expected(case, skip_unused=True)["weights"]
    assert exactness.largest_difference(trained[case.name]["weights"], skipped) > BROKEN


def test_stages_under_3_use_joined_blocks(trained):
    assert all(trained[case.name]["laid_out"] for case in FP32 + BF16 if case.stage < 3)


def test_stage_3_gathers_releases_and_reduces_in_mid_backward(trained):
    for case in (case for case in FP32 + BF16 if case.stage == 3):
        seen = trained[case.name]
        assert seen["gathers"] > 100
        assert seen["released"]
        assert seen["reduces_in_backward"] > 10


def test_stage_2_reduces_in_mid_backward(trained):
    assert all(trained[case.name]["reduces_in_backward"] > 10 for case in FP32 + BF16 if case.stage == 2)


def print_table(folder: Path) -> None:
    """Stage x precision x optimizer, and each part of the fix off: `python -m benchmarks.exactness`."""
    trained = on_ranks(2, exactness.run_cases, ALL, NUM_STEPS, folder=folder)
    for case in ALL:
        print(f"{case.name:75s} {error(trained, case):.1e}")
