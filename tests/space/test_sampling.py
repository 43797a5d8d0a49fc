"""The passes of a step: pure in seed and step, balanced, and as often as announced."""

from collections import Counter

import pytest

from sorted_ds.base.errors import UserError
from sorted_ds.space import Pass, Planned, Policy, Sampler, SubNet
from sorted_ds.space.sampling import STRATEGIES, PolicySampler, Strategy, add_visits, shared_visits

STEPS = 4000
BUILT_IN = ("uniform", "stratified", "sandwich", "full_plus")
EARLIER = {
    "uniform": [[2, 10, 17, 20], [2, 2, 8, 20], [10, 11, 13, 14]],
    "stratified": [[1, 8, 13, 16], [4, 9, 15, 16], [4, 8, 14, 17]],
    "sandwich": [[1, 17, 20, 20], [1, 2, 20, 20], [1, 10, 14, 20]],
    "full_plus": [[1, 10, 16, 20], [5, 11, 19, 20], [1, 11, 18, 20]],
}
"""Depths that seed 17 samples from 20 sub-networks, four a step, in steps 0, 1 and 1000."""


def space(size: int) -> list[SubNet]:
    return [SubNet(d=depth, g=1, f=1) for depth in range(1, size + 1)]


def visits(sampler: Sampler, num_steps: int = STEPS) -> Counter:
    return Counter(subnet for step in range(num_steps) for subnet in sampler.sample(step))


@pytest.mark.parametrize("strategy", BUILT_IN)
def test_what_is_sampled_is_pure_in_seed_and_step(strategy):
    first, again, other = (Sampler(space(20), Policy(4, strategy), seed) for seed in (1, 1, 2))
    steps = [5, 900, 5, 0]
    assert [first.sample(step) for step in steps] == [again.sample(step) for step in steps]
    assert [first.sample(step) for step in range(50)] != [other.sample(step) for step in range(50)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("size", "subnets_per_step"), [(20, 4), (7, 3), (1, 2), (3, 8)])
def test_a_step_trains_as_many_sub_networks_as_asked_for_in_ascending_order(strategy, size, subnets_per_step):
    sampler = Sampler(space(size), Policy(subnets_per_step, strategy), 3)
    for step in range(40):
        sampled = sampler.sample(step)
        assert len(sampled) == subnets_per_step
        assert sampled == sorted(sampled)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("size", "subnets_per_step"), [(20, 4), (7, 3), (1, 2)])
def test_visits_are_as_announced(strategy, size, subnets_per_step):
    sampler = Sampler(space(size), Policy(subnets_per_step, strategy), 3)
    expected, found = sampler.expected_visits(STEPS), visits(sampler)
    assert sum(expected.values()) == pytest.approx(STEPS * subnets_per_step)
    for subnet, number in expected.items():
        assert found[subnet] == pytest.approx(number, abs=5 * STEPS**0.5)


@pytest.mark.parametrize(("size", "subnets_per_step"), [(20, 4), (7, 3), (3, 8), (160, 4)])
def test_stratified_visits_all_exactly_equally_in_every_cycle(size, subnets_per_step):
    sampler = Sampler(space(size), Policy(subnets_per_step, "stratified"), 5)
    for cycle in range(3):
        counts = Counter(s for step in range(size * cycle, size * (cycle + 1)) for s in sampler.sample(step))
        assert counts == dict.fromkeys(space(size), subnets_per_step)


@pytest.mark.parametrize(("size", "subnets_per_step"), [(20, 4), (7, 3), (160, 4)])
def test_stratified_samples_one_from_each_quantile(size, subnets_per_step):
    sampler = Sampler(space(size), Policy(subnets_per_step, "stratified"), 5)
    for step in range(200):
        for stratum, subnet in enumerate(sampler.sample(step)):
            position = subnet.depth - 1
            assert position + 1 > stratum * size / subnets_per_step
            assert position < (stratum + 1) * size / subnets_per_step


def test_stratified_steps_cost_about_the_same():
    """With cost = position: each of the four spreads over a quarter of the space, not over all of it."""
    samplers = {strategy: Sampler(space(160), Policy(4, strategy), 1) for strategy in ("uniform", "stratified")}
    costs = {
        strategy: [sum(s.depth for s in sampler.sample(step)) for step in range(2000)]
        for strategy, sampler in samplers.items()
    }
    variance = {key: sum((c - 322) ** 2 for c in values) / len(values) for key, values in costs.items()}
    assert variance["stratified"] < 0.1 * variance["uniform"]  # a sixteenth, in expectation


def test_stratified_cycles_differ():
    sampler = Sampler(space(20), Policy(4, "stratified"), 5)
    cycles = [tuple(tuple(sampler.sample(step)) for step in range(20 * c, 20 * c + 20)) for c in range(5)]
    assert len(set(cycles)) == 5


def test_sandwich_always_trains_the_smallest_and_the_full_network():
    sampler = Sampler(space(20), Policy(4, "sandwich"), 5)
    steps = [sampler.sample(step) for step in range(300)]
    assert all((step[0].depth, step[-1].depth) == (1, 20) for step in steps)
    assert len({step[1] for step in steps} | {step[2] for step in steps}) == 20


def test_full_plus_trains_the_full_network_once_and_stratifies_the_others():
    sampler = Sampler(space(20), Policy(4, "full_plus"), 5)
    steps = [sampler.sample(step) for step in range(19)]
    assert all(step[-1].depth == 20 for step in steps)
    assert Counter(s.depth for step in steps for s in step[:-1]) == dict.fromkeys(range(1, 20), 3)


@pytest.mark.parametrize("strategy", ["sandwich", "full_plus"])
def test_too_few_sub_networks_in_a_step_are_refused(strategy):
    with pytest.raises(UserError, match=rf"sampling\.subnets_per_step = 1, but {strategy} needs at least 2"):
        Sampler(space(5), Policy(1, strategy), 0)


def test_an_unknown_strategy_is_refused_with_those_that_are_known():
    with pytest.raises(UserError) as refused:
        Sampler(space(5), Policy(2, "sandwitch"), 0)
    assert str(refused.value) == (
        "sampling.strategy = 'sandwitch' is not known. Known: uniform, stratified, sandwich, full_plus, full."
    )


@pytest.mark.parametrize("strategy", BUILT_IN)
def test_each_sampled_sub_network_trains_on_a_share_of_its_own(strategy):
    sampler = Sampler(space(20), Policy(4, strategy), 3)
    assert sampler.num_shares(step=0) == 4
    for step in range(20):
        plan = sampler.plan(step)
        assert [planned.share for planned in plan] == [0, 1, 2, 3]
        assert [planned.pass_.subnet for planned in plan] == sampler.sample(step)
        assert all(planned.pass_.mode == "train" and planned.pass_.has_gradient for planned in plan)


def test_what_is_sampled_never_changes():
    """Written down when `draw` was the word for it (version 0.1): a run of then goes on with the same sub-networks."""
    subnets = space(20)
    found = {
        name: [[s.depth for s in Sampler(subnets, Policy(4, name), 17).sample(step)] for step in (0, 1, 1000)]
        for name in BUILT_IN
    }
    assert found == EARLIER


def taught(sampler: PolicySampler, step: int) -> list[Planned]:
    """Two shares. On each the full network teaches, then trains, and a sampled sub-network learns on the same rows."""
    students = sampler.at_random(step, 2)
    return [
        Planned(Pass(subnet, mode), share)
        for share, student in enumerate(students)
        for subnet, mode in ((sampler.full, "teach"), (sampler.full, "train"), (student, "train"))
    ]


def taught_visits(sampler: PolicySampler) -> dict[SubNet, float]:
    return add_visits({sampler.full: 2.0}, shared_visits(sampler.pool(sampler.subnets), 2))


@pytest.fixture
def with_teacher(monkeypatch) -> Sampler:
    """A sampler whose strategy is one entry of the table, as any that comes later."""
    monkeypatch.setitem(STRATEGIES, "taught", Strategy(taught, taught_visits, shares=lambda policy: 2))
    return Sampler(space(5), Policy(4, "taught"), 7)


def test_a_strategy_may_run_several_passes_on_the_same_share(with_teacher):
    assert with_teacher.num_shares(step=3) == 2
    plan = with_teacher.plan(3)
    assert [planned.share for planned in plan] == [0, 0, 0, 1, 1, 1]
    assert [planned.pass_.mode for planned in plan] == ["teach", "train", "train"] * 2
    assert plan == with_teacher.plan(3)
    student = plan[2].pass_.subnet
    assert list(map(str, plan[:3])) == ["d5-g1-f1/teach/0", "d5-g1-f1/train/0", f"{student}/train/0"]


def test_a_pass_of_a_teacher_is_no_visit(with_teacher):
    assert not Pass(with_teacher.full, "teach").has_gradient
    assert not Pass(with_teacher.full, "evaluate").has_gradient
    assert [len(with_teacher.sample(step)) for step in range(3)] == [4, 4, 4]
    expected, found = with_teacher.expected_visits(STEPS), visits(with_teacher)
    assert sum(found.values()) == 4 * STEPS == pytest.approx(sum(expected.values()))
    for subnet, number in expected.items():
        assert found[subnet] == pytest.approx(number, abs=5 * STEPS**0.5)


def test_passes_of_the_same_sub_network_in_different_modes_are_different():
    """Whatever depends on what runs, like a trace, is kept by the pass."""
    subnet = space(5)[2]
    assert len({Pass(subnet), Pass(subnet, "train"), Pass(subnet, "teach"), Pass(subnet, "evaluate")}) == 3


def test_weights_say_how_often_each_sub_network_is_sampled():
    subnets = space(6)
    weights = dict(zip(subnets, (0.0, 1.0, 2.0, 3.0, 4.0, 5.0), strict=True))
    for strategy in ("uniform", "stratified"):
        sampler = Sampler(subnets, Policy(3, strategy, weights=weights), 5)
        expected, found = sampler.expected_visits(STEPS), visits(sampler)
        assert expected == {subnet: pytest.approx(STEPS * 3 * weight / 15) for subnet, weight in weights.items()}
        for subnet, number in expected.items():
            assert found[subnet] == pytest.approx(number, abs=5 * STEPS**0.5)
        assert not found[subnets[0]]


def test_equal_weights_sample_what_no_weights_sample():
    subnets = space(20)
    for strategy in BUILT_IN:
        plain, weighted = (
            Sampler(subnets, Policy(4, strategy, weights=weights), 17) for weights in ({}, dict.fromkeys(subnets, 2.0))
        )
        assert [plain.sample(step) for step in range(40)] == [weighted.sample(step) for step in range(40)]


def test_weighted_strata_are_quantiles_of_cost():
    """With a weight that grows, the quantiles hold fewer and fewer sub-networks."""
    subnets = space(40)
    sampler = Sampler(subnets, Policy(4, weights={subnet: float(subnet.depth) for subnet in subnets}), 5)
    total = sum(range(41))
    for step in range(300):
        for stratum, subnet in enumerate(sampler.sample(step)):
            below, own = sum(range(subnet.depth)) / total, subnet.depth / total
            assert below <= (stratum + 1) / 4
            assert below + own >= stratum / 4


def test_what_is_never_sampled_leaves_the_ladder():
    subnets = space(5)
    ladder = dict.fromkeys(subnets[1:4], 1.0)
    assert {s for step in range(50) for s in Sampler(subnets, Policy(2, weights=ladder), 1).sample(step)} == {*ladder}
    found = {s for step in range(50) for s in Sampler(subnets, Policy(2, "full_plus", weights=ladder), 1).sample(step)}
    assert found == {*ladder, subnets[4]}, "the full one is always trained"
    with pytest.raises(UserError, match=r"leave no sub-network to sample"):
        Sampler(subnets, Policy(2, weights=dict.fromkeys(subnets, 0.0)), 1)


def test_the_full_network_takes_as_many_shares_as_asked_for():
    sampler = Sampler(space(20), Policy(4, "full_plus", full_shares=3), 5)
    steps = [sampler.sample(step) for step in range(19)]
    assert all([subnet.depth for subnet in step[1:]] == [20, 20, 20] for step in steps)
    assert Counter(step[0].depth for step in steps) == dict.fromkeys(range(1, 20), 1)
    assert sampler.expected_visits(100)[sampler.full] == 300
    with pytest.raises(UserError, match=r"full_plus needs at least 5"):
        Sampler(space(20), Policy(4, "full_plus", full_shares=4), 5)


def test_several_sub_networks_of_a_step_run_on_the_same_rows_the_larger_one_first():
    sampler = Sampler(space(20), Policy(6, "full_plus", full_shares=2, subnets_per_share=3), 5)
    assert sampler.num_shares(0) == 2
    for step in range(20):
        plan = sampler.plan(step)
        assert [planned.share for planned in plan] == [0, 0, 0, 1, 1, 1]
        depths = [planned.pass_.subnet.depth for planned in plan]
        assert (depths[0], depths[3]) == (20, 20), "each share has the full network"
        assert depths[:3] == sorted(depths[:3], reverse=True)
    with pytest.raises(UserError, match=r"cannot be divided by sampling\.subnets_per_share = 4"):
        Sampler(space(20), Policy(6, subnets_per_share=4), 5)


def test_sampled_sub_networks_are_held():
    held, single = (Sampler(space(20), Policy(4, hold_steps=hold), 5) for hold in (3, 1))
    assert [held.sample(step) for step in range(12)] == [single.sample(step // 3) for step in range(12)]


def test_phases_replace_the_policy_and_visits_are_those_of_all_phases():
    subnets = space(20)
    phases = {100: Policy(4, "full_plus"), 300: Policy(2, "full")}
    sampler = Sampler(subnets, Policy(1, "full"), 5, phases)
    assert [sampler.num_shares(step) for step in (0, 99, 100, 299, 300, 5000)] == [1, 1, 4, 4, 2, 2]
    assert sampler.sample(99) == [sampler.full]
    assert sampler.sample(100) == Sampler(subnets, Policy(4, "full_plus"), 5).sample(100)
    assert sampler.sample(300) == [sampler.full] * 2
    expected = sampler.expected_visits(400)
    assert expected[sampler.full] == 100 + 200 + 2 * 100
    assert expected[subnets[0]] == pytest.approx(200 * 3 / 19)
    assert sampler.expected_visits(50) == {**dict.fromkeys(subnets, 0.0), sampler.full: 50.0}
    assert sampler.expected_visits(400, skipped=[0, 350, 350])[sampler.full] == 500 - 1 - 2
    rows = sampler.expected_visits(400, of_visit=lambda phase: 8 / phase.num_shares)
    assert rows[sampler.full] == 100 * 8 + 200 * 2 + 2 * 100 * 4


def test_the_visits_of_weights_are_exact_in_a_space_of_two():
    """Points at the beginning of each part of a quantile would give each of them a half."""
    small, full = space(2)
    found = visits(Sampler([small, full], Policy(1, weights={small: 0.3, full: 0.7}), 5))
    assert found[small] / STEPS == pytest.approx(0.3, abs=0.02)
