"""Plans beyond one sub-network for each share of the rows, and layer orders, train as plain PyTorch does.

A teacher: the full network runs without a gradient before each sub-network, on the same rows. The same rows: three
sub-networks train on each micro-batch, and the step's denominator counts its targets three times. An order: depth takes
the layers in another order than the network's own. Two gloo ranks, one launch for each tier, engines rebuilt inside.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import exactness
from tests.cover import FP32_BOUNDS
from tests.exactness import Case, largest_difference
from tests.spawn import on_ranks
from tests.tiers import Tiers

NUM_RANKS, NUM_STEPS = 2, 4
PLANS = ({"ordered": True, "taught": True, "same_rows": True}, {"taught": True}, {"same_rows": True}, {"ordered": True})
CASES = [Case(stage, optimizer="sgd", prefetch=2_000 * (stage == 3), **plan) for stage in range(4) for plan in PLANS]
CASES += [Case(stage, ordered=True, offload=True, evaluate_between=True) for stage in (1, 2, 3)]
BF16 = [Case(stage, "bf16", "sgd", ordered=True, taught=True) for stage in range(4)]
FIRST_TIER = [case for case in CASES if case.optimizer == "sgd" and case.stage == 3]
FIRST_TIER += [case for case in CASES if case.taught and case.same_rows and case.stage < 3]
TIERS = Tiers([*CASES, *BF16], [*FIRST_TIER, BF16[3]])
each = TIERS.each
BF16_RATIO = 2.0
"""bf16 rounds: within twice what it does to a network that never changes (DESIGN, rule 1)."""


def static(case: Case) -> Case:
    """Returns the case of a network that never changes."""
    return dataclasses.replace(case, static=True, taught=False)


def train(cases: list[Case], folder: Path) -> dict[str, dict]:
    """Returns what two ranks made of each case, and of the static cases of those in bf16."""
    cases = [*cases, *(static(case) for case in cases if case.precision == "bf16")]
    return on_ranks(NUM_RANKS, exactness.run_cases, cases, NUM_STEPS, folder=folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[[Case], dict[str, dict]]:
    """Returns a function from a case to the results of all cases of its tier, by name."""
    return TIERS.started(train, tmp_path_factory)


def error(result: dict, case: Case) -> float:
    expected = exactness.reference_weights(case, NUM_RANKS, NUM_STEPS)
    return largest_difference(result["weights"], expected["weights"])


@each(CASES)
def test_a_plan_trains_as_plain_pytorch_does(trained, case):
    result = trained(case)[case.name]
    assert error(result, case) < FP32_BOUNDS[case.optimizer].weights
    assert result["norms"] == pytest.approx(exactness.reference_weights(case, NUM_RANKS, NUM_STEPS)["norms"], rel=1e-5)


@each(BF16)
def test_bf16_is_as_close_as_a_network_that_never_changes(trained, case):
    results, unchanged = trained(case), static(case)
    assert error(results[case.name], case) < BF16_RATIO * error(results[unchanged.name], unchanged)


@each(CASES)
def test_a_teacher_has_a_loss_and_changes_nothing(trained, case):
    assert ("taught" in trained(case)[case.name]) == case.taught


@each(case for case in CASES + BF16 if case.stage == 3)
def test_under_zero_3_every_pass_follows_its_trace(trained, case):
    result = trained(case)[case.name]
    assert not result["invalidated"]
    assert result["gathers"] > 50


def test_an_order_and_shared_rows_make_a_difference():
    """Otherwise the tests above could not fail."""
    plain = exactness.reference_weights(Case(0, optimizer="sgd"), NUM_RANKS, NUM_STEPS)["weights"]
    for changed in (Case(0, optimizer="sgd", ordered=True), Case(0, optimizer="sgd", same_rows=True)):
        weights = exactness.reference_weights(changed, NUM_RANKS, NUM_STEPS)["weights"]
        assert largest_difference(plain, weights) > 1000 * FP32_BOUNDS["sgd"].weights
