"""Every loss and every policy trains as plain PyTorch does: a cover of them and the modes of the engine.

Two gloo ranks, one launch for each tier, engines rebuilt inside. tests/losses.py has the losses, the policies and the
reference. `python -m benchmarks.losses` prints how far each of them is from it.
"""

from collections.abc import Callable, Iterable
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import torch

from tests import cover, losses
from tests.exactness import Case, largest_difference
from tests.losses import LOSSES, NUM_RANKS, LossCase
from tests.spawn import on_ranks
from tests.tiers import Tiers

NUM_STEPS = 3
ALLOWED = list(losses.settings())
COVER = cover.cover(ALLOWED, cover.pairs)


def core(setting: cover.Setting) -> set[tuple]:
    """Returns what the first tier covers: each value of each factor, and each loss at stage 3."""
    return {*setting.items(), *({("at stage 3", setting["loss"])} if setting["stage"] == 3 else ())}


CASES = [losses.case_of(setting) for setting in COVER]
CORE = [losses.case_of(setting) for setting in cover.cover(COVER, core)]
TIERS = Tiers(CASES, CORE)
each = TIERS.each


def in_fp32(cases: Iterable[LossCase]) -> list[LossCase]:
    return [case for case in cases if case.mode.precision == "fp32"]


def train(cases: list[LossCase], folder: Path) -> dict[str, dict]:
    return on_ranks(NUM_RANKS, losses.run_cases, cases, NUM_STEPS, folder=folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[[LossCase], dict[str, dict]]:
    """Returns a function from a case to the results of all cases of its tier, by name."""
    return TIERS.started(train, tmp_path_factory)


@cache
def expected(case: LossCase) -> dict:
    return losses.reference_weights(case, NUM_RANKS, NUM_STEPS)


def test_the_cover_has_every_pair():
    covered = set().union(*map(cover.pairs, COVER))
    assert covered == set().union(*map(cover.pairs, ALLOWED))
    assert {(loss, policy) for loss in LOSSES for policy in losses.POLICIES} == {(c.loss, c.policy) for c in CASES}
    assert len(COVER) <= 130
    assert len(CORE) <= 16


@each(CASES)
def test_weights_are_those_of_plain_pytorch(trained, case):
    found, bounds = trained(case)[case.name], losses.bounds(case)
    assert largest_difference(found["weights"], expected(case)["weights"]) <= bounds.weights
    assert found["norms"] == pytest.approx(expected(case)["norms"], rel=bounds.norms)


@each(in_fp32(CASES))
def test_the_reported_losses_are_those_of_each_exit(trained, case):
    found, right = trained(case)[case.name]["reported"], expected(case)["reported"]
    assert [run for run, *_ in found] == [run for run, *_ in right]
    scale = losses.LOSSES[case.loss].temperature ** 2  # of a divergence, and so of its rounding
    for (_, nll, parts), (_, right_nll, right_parts) in zip(found, right, strict=True):
        assert nll == pytest.approx(right_nll, rel=1e-5)
        for values, right_values in zip(parts, right_parts if parts else (), strict=True):
            assert values == pytest.approx(right_values, rel=1e-4, abs=1e-4 * scale)


@each([case for case in CASES if case.mode.stage == 3])
def test_under_zero_3_every_pass_follows_its_trace(trained, case):
    assert not trained(case)[case.name]["invalidated"]


def test_each_loss_and_each_policy_makes_a_difference():
    """Otherwise the tests above could not fail."""
    mode = Case(0, optimizer="sgd")
    for cases in (
        [LossCase(mode, loss, "full_plus") for loss in LOSSES],
        [LossCase(mode, "full_teaches", policy) for policy in losses.POLICIES],
    ):
        weights = [torch.cat([value.flatten() for value in expected(case)["weights"].values()]) for case in cases]
        for (one, a), (other, b) in combinations(zip(cases, weights, strict=True), 2):
            assert (a - b).abs().max() > 100 * losses.bounds(one).weights, (one, other)
