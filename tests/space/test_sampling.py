"""The passes of a step: pure in seed and step, balanced, and as often as announced."""

from collections import Counter

import pytest

from sorted_ds.base.errors import UserError
from sorted_ds.space import SubNet
from sorted_ds.space.sampling import STRATEGIES, Pass, Planned, Sampler, Strategy, add_visits, equal_visits

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


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_sampled_is_pure_in_seed_and_step(strategy):
    first, again, other = (Sampler(space(20), 4, strategy, seed) for seed in (1, 1, 2))
    steps = [5, 900, 5, 0]
    assert [first.sample(step) for step in steps] == [again.sample(step) for step in steps]
    assert [first.sample(step) for step in range(50)] != [other.sample(step) for step in range(50)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("size", "subnets_per_step"), [(20, 4), (7, 3), (1, 2), (3, 8)])
def test_a_step_trains_as_many_sub_networks_as_asked_for_in_ascending_order(strategy, size, subnets_per_step):
    sampler = Sampler(space(size), subnets_per_step, strategy, 3)
    for step in range(40):
        sampled = sampler.sample(step)
        assert len(sampled) == subnets_per_step
        assert sampled == sorted(sampled)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("size", "subnets_per_step"), [(20, 4), (7, 3), (1, 2)])
def test_visits_are_as_announced(strategy, size, subnets_per_step):
    sampler = Sampler(space(size), subnets_per_step, strategy, 3)
    expected, found = sampler.expected_visits(STEPS), visits(sampler)
    assert sum(expected.values()) == pytest.approx(STEPS * subnets_per_step)
    for subnet, number in expected.items():
        assert found[subnet] == pytest.approx(number, abs=5 * STEPS**0.5)


@pytest.mark.parametrize(("size", "subnets_per_step"), [(20, 4), (7, 3), (3, 8), (160, 4)])
def test_stratified_visits_all_exactly_equally_in_every_cycle(size, subnets_per_step):
    sampler = Sampler(space(size), subnets_per_step, "stratified", 5)
    for cycle in range(3):
        counts = Counter(s for step in range(size * cycle, size * (cycle + 1)) for s in sampler.sample(step))
        assert counts == dict.fromkeys(space(size), subnets_per_step)


@pytest.mark.parametrize(("size", "subnets_per_step"), [(20, 4), (7, 3), (160, 4)])
def test_stratified_samples_one_from_each_quantile(size, subnets_per_step):
    sampler = Sampler(space(size), subnets_per_step, "stratified", 5)
    for step in range(200):
        for stratum, subnet in enumerate(sampler.sample(step)):
            position = subnet.depth - 1
            assert position + 1 > stratum * size / subnets_per_step
            assert position < (stratum + 1) * size / subnets_per_step


def test_stratified_steps_cost_about_the_same():
    """With cost = position: each of the four spreads over a quarter of the space, not over all of it."""
    costs = {
        strategy: [sum(s.depth for s in Sampler(space(160), 4, strategy, 1).sample(step)) for step in range(2000)]
        for strategy in ("uniform", "stratified")
    }
    variance = {key: sum((c - 322) ** 2 for c in values) / len(values) for key, values in costs.items()}
    assert variance["stratified"] < 0.1 * variance["uniform"]  # a sixteenth, in expectation


def test_stratified_cycles_differ():
    sampler = Sampler(space(20), 4, "stratified", 5)
    cycles = [tuple(tuple(sampler.sample(step)) for step in range(20 * c, 20 * c + 20)) for c in range(5)]
    assert len(set(cycles)) == 5


def test_sandwich_always_trains_the_smallest_and_the_full_network():
    sampler = Sampler(space(20), 4, "sandwich", 5)
    steps = [sampler.sample(step) for step in range(300)]
    assert all((step[0].depth, step[-1].depth) == (1, 20) for step in steps)
    assert len({step[1] for step in steps} | {step[2] for step in steps}) == 20


def test_full_plus_trains_the_full_network_once_and_stratifies_the_others():
    sampler = Sampler(space(20), 4, "full_plus", 5)
    steps = [sampler.sample(step) for step in range(19)]
    assert all(step[-1].depth == 20 for step in steps)
    assert Counter(s.depth for step in steps for s in step[:-1]) == dict.fromkeys(range(1, 20), 3)


@pytest.mark.parametrize("strategy", ["sandwich", "full_plus"])
def test_too_few_sub_networks_in_a_step_are_refused(strategy):
    with pytest.raises(UserError, match=rf"sampling\.subnets_per_step = 1, but {strategy} needs at least 2"):
        Sampler(space(5), 1, strategy, 0)


def test_an_unknown_strategy_is_refused_with_those_that_are_known():
    with pytest.raises(UserError) as refused:
        Sampler(space(5), 2, "sandwitch", 0)
    assert str(refused.value) == (
        "sampling.strategy = 'sandwitch' is not known. Known: uniform, stratified, sandwich, full_plus."
    )


@pytest.mark.parametrize("strategy", BUILT_IN)
def test_each_sampled_sub_network_trains_on_a_share_of_its_own(strategy):
    sampler = Sampler(space(20), 4, strategy, 3)
    assert sampler.num_shares == 4
    for step in range(20):
        plan = sampler.plan(step)
        assert [planned.share for planned in plan] == [0, 1, 2, 3]
        assert [planned.run.subnet for planned in plan] == sampler.sample(step)
        assert all(planned.run.mode == "train" and planned.run.has_gradient for planned in plan)


def test_what_is_sampled_never_changes():
    """Written down when `draw` was the word for it (version 0.1): a run of then goes on with the same sub-networks."""
    subnets = space(20)
    found = {
        name: [[s.depth for s in Sampler(subnets, 4, name, 17).sample(step)] for step in (0, 1, 1000)]
        for name in BUILT_IN
    }
    assert found == EARLIER


def taught(sampler: Sampler, step: int) -> list[Planned]:
    """Two shares. On each the full network teaches, then trains, and a sampled sub-network learns on the same rows."""
    students = sampler.at_random(step, 2)
    return [
        Planned(Pass(subnet, mode), share)
        for share, student in enumerate(students)
        for subnet, mode in ((sampler.full, "teach"), (sampler.full, "train"), (student, "train"))
    ]


def taught_visits(sampler: Sampler) -> dict[SubNet, float]:
    return add_visits({sampler.full: 2.0}, equal_visits(sampler.subnets, 2))


@pytest.fixture
def with_teacher(monkeypatch) -> Sampler:
    """A sampler whose strategy is one entry of the table, as any that comes later."""
    monkeypatch.setitem(STRATEGIES, "taught", Strategy(taught, taught_visits, shares=lambda subnets_per_step: 2))
    return Sampler(space(5), 4, "taught", 7)


def test_a_strategy_may_run_several_passes_on_the_same_share(with_teacher):
    assert with_teacher.num_shares == 2
    plan = with_teacher.plan(3)
    assert [planned.share for planned in plan] == [0, 0, 0, 1, 1, 1]
    assert [planned.run.mode for planned in plan] == ["teach", "train", "train"] * 2
    assert plan == with_teacher.plan(3)
    student = plan[2].run.subnet
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
