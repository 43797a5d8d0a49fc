"""Distillation, another teacher, exits and layer dropout train as plain PyTorch does, at every ZeRO stage.

Two gloo ranks, one launch for each tier, engines rebuilt inside. tests/losses.py has the reference.
"""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests import losses
from tests.cover import FP32_BOUNDS
from tests.exactness import Case, largest_difference
from tests.losses import LossCase
from tests.spawn import on_ranks
from tests.tiers import Tiers

NUM_RANKS, NUM_STEPS = 2, 3
TERMS = (
    {"teacher": "full"},
    {"teacher": "full", "subnets_per_share": 2, "temperature": 2.0},
    {"teacher": "other", "strategy": "stratified", "temperature": 1.5},
    {"exit_weight": 0.3},
    {"layer_dropout": 0.7},
    {"teacher": "full", "exit_weight": 0.5, "layer_dropout": 0.7, "subnets_per_share": 4},
    {"teacher": "other", "exit_weight": 1.0, "strategy": "sandwich"},
)
SGD = [LossCase(Case(s, optimizer="sgd", prefetch=2_000 * (s == 3)), **terms) for s in range(4) for terms in TERMS]
ALL_TERMS = TERMS[5]
MORE = [
    LossCase(Case(3, checkpointing=True, tied=True), **ALL_TERMS),
    LossCase(Case(3, offload=True, offload_param=True, overlap=True), **ALL_TERMS),
    LossCase(Case(1, offload=True), **ALL_TERMS),
    LossCase(Case(2, overlap=True), **TERMS[6]),
    LossCase(Case(3, ordered=True), teacher="full", layer_dropout=0.7),
]
BF16 = [LossCase(Case(stage, "bf16", "sgd"), **ALL_TERMS) for stage in range(4)]
FIRST_TIER = [case for case in SGD if case.mode.stage == 3] + [SGD[5], SGD[12], SGD[20], MORE[0]]
TIERS = Tiers([*SGD, *MORE, *BF16], [*FIRST_TIER, BF16[3]])
each = TIERS.each
BF16_BOUND = 1e-3
"""SGD at a rate of 1, in bf16: tests/cover.py."""


def train(cases: list[LossCase], folder: Path) -> dict[str, dict]:
    return on_ranks(NUM_RANKS, losses.run_cases, cases, NUM_STEPS, folder=folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[[LossCase], dict[str, dict]]:
    """Returns a function from a case to the results of all cases of its tier, by name."""
    return TIERS.started(train, tmp_path_factory)


@cache
def expected(case: LossCase) -> dict:
    return losses.reference_weights(case, NUM_RANKS, NUM_STEPS)


@each([*SGD, *MORE])
def test_weights_are_those_of_plain_pytorch(trained, case):
    found = trained(case)[case.name]
    assert largest_difference(found["weights"], expected(case)["weights"]) < FP32_BOUNDS[case.mode.optimizer].weights
    assert found["norms"] == pytest.approx(expected(case)["norms"], rel=1e-5)


@each(BF16)
def test_bf16_is_within_its_bound(trained, case):
    found = trained(case)[case.name]
    assert largest_difference(found["weights"], expected(case)["weights"]) < BF16_BOUND


@each([*SGD, *MORE])
def test_the_reported_losses_are_those_of_each_exit(trained, case):
    found, right = trained(case)[case.name]["reported"], expected(case)["reported"]
    assert [run for run, *_ in found] == [run for run, *_ in right]
    for (_, nll, parts), (_, right_nll, right_parts) in zip(found, right, strict=True):
        assert nll == pytest.approx(right_nll, rel=1e-5)
        for values, right_values in zip(parts, right_parts if parts else (), strict=True):
            assert values == pytest.approx(right_values, rel=1e-4, abs=1e-4)


@each([case for case in (*SGD, *MORE, *BF16) if case.mode.stage == 3])
def test_under_zero_3_every_pass_follows_its_trace(trained, case):
    assert not trained(case)[case.name]["invalidated"]


def test_each_term_makes_a_difference():
    """Otherwise the tests above could not fail."""
    cases = [LossCase(Case(0, optimizer="sgd"), **terms) for terms in ({}, *TERMS)]
    weights = [torch.cat([value.flatten() for value in expected(case)["weights"].values()]) for case in cases]
    for (one, a), (other, b) in pairwise(zip(cases, weights, strict=True)):
        assert (a - b).abs().max() > 1000 * FP32_BOUNDS["sgd"].weights, (one, other)
