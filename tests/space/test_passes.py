"""The passes that the loss adds to the sampled ones: teachers, exits, and layers that are left out."""

from collections import Counter

import pytest

from sorted_ds.space import LossPasses, Pass, Planned, Policy, Sampler, SubNetSpace
from sorted_ds.space.passes import dropped_layers, exits_of, layers_that_run

SPACE = SubNetSpace.grid(depths=[1, 2, 4], groups=[1, 2], ffn=[16, 32])
FULL, DEEP, SHALLOW = SPACE["d4-g2-f32"], SPACE["d4-g1-f16"], SPACE["d1-g2-f32"]


def applied(plan: list[Planned], space: SubNetSpace = SPACE, step: int = 0, **loss) -> list[Planned]:
    return LossPasses(**loss).applied(plan, space, 5, step)


def one_each(*subnets) -> list[Planned]:
    return [Planned(Pass(subnet), share) for share, subnet in enumerate(subnets)]


def test_without_terms_the_plan_is_as_it_was_sampled():
    plan = one_each(DEEP, SHALLOW, FULL)
    assert applied(plan) == plan


def test_the_full_network_teaches_in_a_pass_of_its_own_where_it_does_not_train():
    plan = applied(one_each(DEEP, FULL), full_teaches=True)
    assert [str(planned) for planned in plan] == ["d4-g2-f32/teach/0", "d4-g1-f16/train/0", "d4-g2-f32/train/1"]


def test_the_full_network_teaches_from_its_training_pass_on_the_same_rows():
    plan = applied([Planned(Pass(DEEP), 0), Planned(Pass(FULL), 0)], full_teaches=True)
    assert [str(planned) for planned in plan] == ["d4-g2-f32/train/0", "d4-g1-f16/train/0"]


def test_a_pass_exits_at_the_smaller_depths_of_the_space():
    assert exits_of(FULL, SPACE) == (1, 2)
    assert exits_of(SPACE["d2-g1-f16"], SPACE) == (1,)
    assert exits_of(SHALLOW, SPACE) == ()
    [planned] = applied(one_each(DEEP), exit_rate=1.0)
    assert str(planned) == "d4-g1-f16/train exits (1, 2)/0"


def test_exits_are_taken_with_the_rate_and_are_pure_in_seed_and_step():
    sampler = [Sampler(list(SPACE), Policy(2, "full"), seed, loss=LossPasses(exit_rate=0.3)) for seed in (1, 1, 2)]
    taken = [[planned.pass_.exits for step in range(2000) for planned in each.plan(step)] for each in sampler]
    assert taken[0] == taken[1] != taken[2]
    counts = Counter(exits for exits in taken[0])
    assert counts[(1, 2)] / 4000 == pytest.approx(0.09, abs=0.02)
    assert counts[(1,)] / 4000 == pytest.approx(0.21, abs=0.02)
    assert counts[()] / 4000 == pytest.approx(0.49, abs=0.03)


def test_a_pass_exits_only_at_sub_networks_that_are_in_the_space():
    ladder = SubNetSpace.of(["d1-g1-f16", "d2-g2-f32", "d4-g2-f32"])
    assert exits_of(ladder["d4-g2-f32"], ladder) == (2,)


def test_with_an_order_a_pass_exits_only_where_the_layers_come_first():
    front = SubNetSpace(SPACE, layer_order=(0, 1, 3, 2))
    assert exits_of(front["d4-g2-f32"], front) == (1, 2)
    middle = SubNetSpace(SPACE, layer_order=(0, 3, 1, 2))
    assert exits_of(middle["d4-g2-f32"], middle) == (1,), "d2 runs layers 0 and 3, and the pass runs 0, 1, 2, 3"


def test_passes_with_other_exits_or_layers_are_different():
    """Whatever depends on what runs, like a trace, is kept by the pass."""
    assert len({Pass(FULL), Pass(FULL, exits=(1,)), Pass(FULL, dropped=(2,)), Pass(FULL, "teach")}) == 4


def test_dropout_grows_with_depth_and_spares_the_first_layer():
    layers, rate, num = (0, 2, 3, 5), 0.6, 4000
    counts = Counter(layer for step in range(num) for layer in dropped_layers(layers, rate, (7, "dropout", step)))
    assert counts[0] == 0
    for position, layer in enumerate(layers):
        expected = rate * (2 ** (position / 3) - 1)
        assert counts[layer] / num == pytest.approx(expected, abs=0.03)
    assert counts[5] / num == pytest.approx(rate, abs=0.03), "the last layer has the whole rate"


def test_dropout_is_pure_in_seed_and_step_and_differs_between_passes():
    sampler = [Sampler(list(SPACE), Policy(4), seed, loss=LossPasses(layer_dropout=0.9)) for seed in (1, 1, 2)]
    plans = [[each.plan(step) for step in (5, 3, 5)] for each in sampler]
    assert plans[0] == plans[1] != plans[2]
    dropped = [planned.pass_.dropped for step in range(30) for planned in sampler[0].plan(step)]
    assert len(set(dropped)) > 3


def test_a_dropped_layer_does_not_run():
    [planned] = [p for p in applied(one_each(FULL), layer_dropout=0.99, step=1) if p.pass_.dropped]
    assert layers_that_run(planned.pass_, SPACE) == tuple(n for n in range(4) if n not in planned.pass_.dropped)
    assert layers_that_run(planned.pass_, SPACE)[0] == 0


def test_a_teacher_and_an_evaluation_have_all_layers():
    plan = applied(one_each(DEEP, FULL), full_teaches=True, layer_dropout=0.99)
    assert all(not planned.pass_.dropped for planned in plan if planned.pass_.subnet == FULL)
