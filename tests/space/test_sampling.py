"""Samples: pure, balanced, and as often as announced."""

from collections import Counter

import pytest

from sorted_ds.base.errors import UserError
from sorted_ds.space import SubNet
from sorted_ds.space.sampling import STRATEGIES, Sampler

STEPS = 4000


def space(size: int) -> list[SubNet]:
    return [SubNet(d=depth, g=1, f=1) for depth in range(1, size + 1)]


def visits(schedule: Sampler, num_steps: int = STEPS) -> Counter:
    return Counter(subnet for step in range(num_steps) for subnet in schedule.sample(step))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_samples_are_pure_in_seed_and_step(strategy):
    first, again, other = (Sampler(space(20), 4, strategy, seed) for seed in (1, 1, 2))
    steps = [5, 900, 5, 0]
    assert [first.sample(step) for step in steps] == [again.sample(step) for step in steps]
    assert [first.sample(step) for step in range(50)] != [other.sample(step) for step in range(50)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("size", "samples"), [(20, 4), (7, 3), (1, 2), (3, 8)])
def test_a_step_has_as_many_samples_as_asked_for_in_ascending_order(strategy, size, samples):
    schedule = Sampler(space(size), samples, strategy, 3)
    for step in range(40):
        active = schedule.sample(step)
        assert len(active) == samples
        assert active == sorted(active)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("size", "samples"), [(20, 4), (7, 3), (1, 2)])
def test_visits_are_as_announced(strategy, size, samples):
    schedule = Sampler(space(size), samples, strategy, 3)
    expected, found = schedule.expected_visits(STEPS), visits(schedule)
    assert sum(expected.values()) == pytest.approx(STEPS * samples)
    for subnet, number in expected.items():
        assert found[subnet] == pytest.approx(number, abs=5 * STEPS**0.5)


@pytest.mark.parametrize(("size", "samples"), [(20, 4), (7, 3), (3, 8), (160, 4)])
def test_stratified_visits_all_exactly_equally_in_every_cycle(size, samples):
    schedule = Sampler(space(size), samples, "stratified", 5)
    for cycle in range(3):
        counts = Counter(s for step in range(size * cycle, size * (cycle + 1)) for s in schedule.sample(step))
        assert counts == dict.fromkeys(space(size), samples)


@pytest.mark.parametrize(("size", "samples"), [(20, 4), (7, 3), (160, 4)])
def test_stratified_samples_one_from_each_quantile(size, samples):
    schedule = Sampler(space(size), samples, "stratified", 5)
    for step in range(200):
        for stratum, subnet in enumerate(schedule.sample(step)):
            position = subnet.depth - 1
            assert position + 1 > stratum * size / samples
            assert position < (stratum + 1) * size / samples


def test_stratified_steps_cost_about_the_same():
    """With cost = position: the spread of a step's cost is that of four quarters, half of four uniform samples'."""
    costs = {
        strategy: [sum(s.depth for s in Sampler(space(160), 4, strategy, 1).sample(step)) for step in range(2000)]
        for strategy in ("uniform", "stratified")
    }
    variance = {key: sum((c - 322) ** 2 for c in values) / len(values) for key, values in costs.items()}
    assert variance["stratified"] < 0.1 * variance["uniform"]  # a sixteenth, in expectation


def test_stratified_cycles_differ():
    schedule = Sampler(space(20), 4, "stratified", 5)
    cycles = [tuple(tuple(schedule.sample(step)) for step in range(20 * c, 20 * c + 20)) for c in range(5)]
    assert len(set(cycles)) == 5


def test_sandwich_always_holds_the_smallest_and_the_full_one():
    schedule = Sampler(space(20), 4, "sandwich", 5)
    active = [schedule.sample(step) for step in range(300)]
    assert all((step[0].depth, step[-1].depth) == (1, 20) for step in active)
    assert len({step[1] for step in active} | {step[2] for step in active}) == 20


def test_full_plus_samples_the_full_one_once_and_stratifies_the_others():
    schedule = Sampler(space(20), 4, "full_plus", 5)
    active = [schedule.sample(step) for step in range(19)]
    assert all(step[-1].depth == 20 for step in active)
    assert Counter(s.depth for step in active for s in step[:-1]) == dict.fromkeys(range(1, 20), 3)


@pytest.mark.parametrize("strategy", ["sandwich", "full_plus"])
def test_too_few_samples_are_refused(strategy):
    with pytest.raises(UserError, match=rf"schedule\.samples = 1, but {strategy} needs at least 2"):
        Sampler(space(5), 1, strategy, 0)
