"""Sub-networks over any axes, their names, the space and its layer order."""

from dataclasses import FrozenInstanceError
from itertools import pairwise

import pytest

from sorted_ds.base.errors import UserError
from sorted_ds.space import SubNet, SubNetSpace

GRID = SubNetSpace.grid(depths=[4, 2], groups=[1, 2], ffn=[64, 32, 96])


def test_a_name_is_read_back():
    assert SubNet(d=12, g=4, f=2048).name == str(SubNet(d=12, g=4, f=2048)) == "d12-g4-f2048"
    assert SubNet.parse("d12-g4-f2048") == SubNet(d=12, g=4, f=2048)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "d",
        "d4-",
        "d0-g1-f1",
        "d4-g2-f08",
        "d04-g2-f8",
        "d4-g2-f8 ",
        "D4-g2-f8",
        "d-4-g2-f8",
        "d4-g2-z8",  # z is no axis
        "d4-g2-g2",  # an axis twice
    ],
)
def test_what_is_no_name_is_refused(text):
    with pytest.raises(UserError, match="is not the name of a sub-network"):
        SubNet.parse(text)


@pytest.mark.parametrize(
    ("subnet", "name"),
    [(SubNet(d=3, w=48), "d3-w48"), (SubNet(d=4, f=256), "d4-f256"), (SubNet(d=7), "d7")],
)
def test_a_sub_network_has_the_axes_of_its_family_alone(subnet, name):
    assert subnet.name == name
    assert SubNet.parse(name) == subnet
    assert subnet.axes == tuple(letter for letter, _ in subnet.sizes)
    assert subnet.depth == subnet["d"]
    assert "g" not in subnet.axes
    with pytest.raises(KeyError):
        subnet["g"]


def test_sizes_on_different_axes_make_different_sub_networks():
    assert SubNet(d=3, w=48) != SubNet(d=3, f=48)
    assert len({SubNet(d=3, w=48), SubNet(d=3, f=48), SubNet.parse("d3-w48")}) == 2


def test_an_axis_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(UserError, match=r"'z' is not an axis\. Axes: d, g, f, w\."):
        SubNet(d=2, z=3)


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_under_one_is_refused(size):
    with pytest.raises(UserError, match=rf"w{size}: a size must be at least 1"):
        SubNet(d=2, w=size)


def test_a_sub_network_is_immutable_and_replace_returns_another():
    subnet = SubNet(d=3, w=48)
    assert subnet.replace(w=16) == SubNet(d=3, w=16)
    assert subnet == SubNet(d=3, w=48)
    with pytest.raises(FrozenInstanceError):
        subnet.sizes = (("d", 1),)


def test_a_part_of_the_name_says_which_sizes_own_something():
    assert SubNet(d=4, g=2, f=256).name_along(("d",)) == "d4"
    assert SubNet(d=4, g=2, f=256).name_along(("d", "f")) == "d4-f256"


def test_the_distance_is_the_sum_of_relative_differences():
    assert SubNet(d=4, w=48).distance(SubNet(d=4, w=48)) == 0
    assert SubNet(d=4, w=48).distance(SubNet(d=2, w=48)) == 1
    assert SubNet(d=2, w=48).distance(SubNet(d=4, w=72)) == 1.5


def test_a_sub_network_is_within_another_when_every_size_is():
    assert SubNet(d=2, w=16).is_within(SubNet(d=2, w=48))
    assert not SubNet(d=2, w=48).is_within(SubNet(d=4, w=16))
    assert SubNet(d=2, g=1, f=32).is_within(SubNet(d=4, g=2, f=96))
    assert SubNet(d=2, g=1, f=32).is_within(SubNet(d=2, g=1, f=32))
    assert not SubNet(d=2, g=3, f=32).is_within(SubNet(d=4, g=2, f=96))
    assert not SubNet(d=5, g=1, f=32).is_within(SubNet(d=4, g=2, f=96))
    assert not SubNet(d=2, g=1, f=128).is_within(SubNet(d=4, g=2, f=96))


def test_a_grid_holds_every_combination_once_in_ascending_order():
    assert len(GRID) == 2 * 2 * 3
    assert list(GRID) == sorted(set(GRID))
    assert {(s.depth, s["g"], s["f"]) for s in GRID} == {
        (d, g, f) for d in (2, 4) for g in (1, 2) for f in (32, 64, 96)
    }
    assert (GRID.sizes("d"), GRID.sizes("g"), GRID.sizes("f")) == ((2, 4), (1, 2), (32, 64, 96))


def test_every_sub_network_is_within_the_full_one():
    assert GRID.full == SubNet(d=4, g=2, f=96)
    assert GRID.smallest == SubNet(d=2, g=1, f=32)
    assert all(subnet.is_within(GRID.full) for subnet in GRID)


def test_sub_networks_are_found_by_position_slice_and_name():
    assert GRID[0] == GRID["d2-g1-f32"] == SubNet(d=2, g=1, f=32)
    assert GRID[-1] == GRID.full
    assert GRID[:2] == (SubNet(d=2, g=1, f=32), SubNet(d=2, g=1, f=64))
    assert SubNet(d=2, g=1, f=64) in GRID
    assert SubNet(d=3, g=1, f=64) not in GRID
    assert GRID.index(SubNet(d=2, g=1, f=64)) == 1


def test_a_name_outside_the_space_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"d3-g2-f96 is not in the space\. Nearest that are: d4-g2-f96, d2-g2-f96"):
        GRID["d3-g2-f96"]


@pytest.mark.parametrize("name", ["d4-g2", "d4-f96", "d4-w96", "d4-f96-g2"])
def test_a_name_with_other_axes_is_answered_with_one_of_the_space(name):
    with pytest.raises(UserError, match=rf"{name} is not in the space, whose sub-networks are named like d4-g2-f96\."):
        GRID[name]


def test_a_list_of_names_is_a_space():
    space = SubNetSpace.of(["d4-g2-f96", "d2-g1-f32"])
    assert list(space) == [SubNet(d=2, g=1, f=32), SubNet(d=4, g=2, f=96)]


def test_a_space_of_two_axes_is_a_space_like_any_other():
    space = SubNetSpace.grid(depths=[1, 3], widths=[16, 48])
    assert space.axes == ("d", "w")
    assert [subnet.name for subnet in space] == ["d1-w16", "d1-w48", "d3-w16", "d3-w48"]
    assert space.sizes("w") == (16, 48)
    assert (space.smallest.name, space.full.name) == ("d1-w16", "d3-w48")
    assert space["d3-w16"] == SubNet(d=3, w=16)
    with pytest.raises(UserError, match=r"d3-w32 is not in the space\. Nearest that are: d3-w48, d3-w16"):
        space["d3-w32"]
    with pytest.raises(KeyError):
        space.sizes("g")


def test_a_grid_has_its_axes_in_the_order_of_names_whatever_the_order_of_its_lists():
    space = SubNetSpace.grid(ffn=[32], depths=[1, 2], groups=[3])
    assert [subnet.name for subnet in space] == ["d1-g3-f32", "d2-g3-f32"]


def test_a_list_of_sizes_that_belongs_to_no_axis_is_refused():
    with pytest.raises(UserError, match=r"space\.heads is not a list of sizes\. Known: depths, groups, ffn, widths\."):
        SubNetSpace.grid(depths=[1], heads=[2])


@pytest.mark.parametrize("names", [["d2-g1-f32", "d4-f96"], ["d2-w16", "d4-f96"], ["d2-f16", "f96-d4"]])
def test_sub_networks_with_different_axes_are_no_space(names):
    with pytest.raises(UserError, match=rf"space has {names[0]} and {names[1]}, which differ in their axes"):
        SubNetSpace.of(names)


def test_a_space_without_a_depth_is_refused():
    with pytest.raises(UserError, match=r"space has g1-f32, without a depth\. Name sizes along d \(depths\)\."):
        SubNetSpace.grid(groups=[1, 2], ffn=[32])
    with pytest.raises(UserError, match=r"space has w16, without a depth\."):
        SubNetSpace.of(["w16", "w48"])


def test_a_space_needs_a_largest():
    with pytest.raises(UserError, match=r"no sub-network that holds all others\. Add d4-g2-f32"):
        SubNetSpace.of(["d4-g1-f32", "d2-g2-f32"])


def test_an_empty_space_is_refused():
    with pytest.raises(UserError, match="space is empty"):
        SubNetSpace([])


def test_a_repeated_sub_network_is_named():
    with pytest.raises(UserError, match="names d4-g2-f96 more than once"):
        SubNetSpace.of(["d4-g2-f96", "d2-g1-f32", "d4-g2-f96"])


@pytest.mark.parametrize("depths", [[], [0, 2], [-1]])
def test_sizes_under_one_are_refused(depths):
    with pytest.raises(UserError, match=r"space\.depths = .* must be a list of sizes of at least 1"):
        SubNetSpace.grid(depths=depths, groups=[1], ffn=[8])


def test_repeated_sizes_are_refused():
    with pytest.raises(UserError, match=r"space\.ffn = \[8, 8\] names a size more than once"):
        SubNetSpace.grid(depths=[1], groups=[1], ffn=[8, 8])


def test_another_order_keeps_the_sub_networks():
    turned = GRID.sorted_by(lambda s: (-s.depth, s))
    assert set(turned) == set(GRID)
    assert turned[0].depth == 4
    assert turned.full == GRID.full


def test_a_depth_is_a_prefix_of_the_layers_unless_an_order_says_otherwise():
    assert GRID.layer_order == (0, 1, 2, 3)
    assert not GRID.has_own_order
    assert [GRID.layers_of(SubNet(d=depth, g=1, f=32)) for depth in (1, 2, 4)] == [(0,), (0, 1), (0, 1, 2, 3)]


def test_a_depth_takes_the_first_layers_of_the_order_and_runs_them_in_their_own_sequence():
    space = SubNetSpace.grid(depths=[1, 2, 4], groups=[1], ffn=[32], layer_order=[3, 0, 2, 1])
    assert space.layer_order == (3, 0, 2, 1)
    assert space.has_own_order
    layers = {depth: space.layers_of(SubNet(d=depth, g=1, f=32)) for depth in (1, 2, 3, 4)}
    assert layers == {1: (3,), 2: (0, 3), 3: (0, 2, 3), 4: (0, 1, 2, 3)}


def test_the_layers_of_a_depth_are_those_of_every_larger_one():
    space = SubNetSpace.grid(depths=[1, 2, 3, 5], widths=[8], layer_order=[4, 1, 0, 3, 2])
    layers = [set(space.layers_of(subnet)) for subnet in space]
    assert all(small < large for small, large in pairwise(layers))


@pytest.mark.parametrize("make", [SubNetSpace.of, SubNetSpace], ids=["names", "sub-networks"])
def test_every_way_to_make_a_space_takes_an_order(make):
    members = list(GRID) if make is SubNetSpace else [subnet.name for subnet in GRID]
    assert make(members, layer_order=[0, 3, 1, 2]).layer_order == (0, 3, 1, 2)
    assert make(members).layer_order == (0, 1, 2, 3)


def test_sorting_a_space_keeps_its_layer_order():
    space = SubNetSpace.grid(depths=[2, 4], groups=[1, 2], ffn=[32], layer_order=[0, 3, 1, 2])
    turned = space.sorted_by(lambda s: (-s.depth, s))
    assert turned[0].depth == 4
    assert turned.layer_order == (0, 3, 1, 2)
    assert turned.layers_of(SubNet(d=2, g=1, f=32)) == (0, 3)


@pytest.mark.parametrize("order", [[], [0, 1, 2], [0, 1, 2, 2], [1, 2, 3, 4], [0, 1, 2, 3, 4], [-1, 0, 1, 2]])
def test_an_order_that_is_not_a_permutation_is_refused(order):
    with pytest.raises(UserError) as refused:
        SubNetSpace.grid(depths=[2, 4], groups=[1], ffn=[32], layer_order=order)
    assert str(refused.value) == (
        f"space.layer_order = {order} is not a permutation of the 4 layers. Name each number from 0 to 3 once."
    )
