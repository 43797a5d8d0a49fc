"""Sub-networks, their names and the space."""

import pytest

from sorted_ds.base.errors import UserError
from sorted_ds.space import SubNet, SubNetSpace

GRID = SubNetSpace.grid(depths=[4, 2], groups=[1, 2], ffn=[64, 32, 96])


def test_a_name_is_read_back():
    assert SubNet(d=12, g=4, f=2048).name == str(SubNet(d=12, g=4, f=2048)) == "d12-g4-f2048"
    assert SubNet.parse("d12-g4-f2048") == SubNet(d=12, g=4, f=2048)


@pytest.mark.parametrize(
    "text", ["", "d4-g2", "d0-g1-f1", "d4-g2-f08", "d04-g2-f8", "d4-g2-f8 ", "D4-g2-f8", "d-4-g2-f8"]
)
def test_what_is_no_name_is_refused(text):
    with pytest.raises(UserError, match="no sub-network's name"):
        SubNet.parse(text)


def test_a_sub_network_is_within_another_when_every_size_is():
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


def test_a_list_of_names_is_a_space():
    space = SubNetSpace.of(["d4-g2-f96", "d2-g1-f32"])
    assert list(space) == [SubNet(d=2, g=1, f=32), SubNet(d=4, g=2, f=96)]


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
