"""Keyed numbers are even and never change; shuffles are permutations in constant memory."""

from collections import Counter
from itertools import pairwise

import pytest

from sorted_ds.base.shuffle import Shuffle, keyed_number


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 4097])
def test_a_shuffle_is_a_permutation(size):
    assert sorted(map(Shuffle(size, (7, "rows")), range(size))) == list(range(size))


def test_another_key_gives_another_order_and_the_same_key_the_same():
    orders = [tuple(map(Shuffle(50, (7, epoch)), range(50))) for epoch in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


def test_all_orders_of_three_are_about_equally_frequent():
    counts = Counter(tuple(map(Shuffle(3, (key,)), range(3))) for key in range(6000))
    assert len(counts) == 6
    assert all(abs(count - 1000) < 150 for count in counts.values())  # five standard deviations


def test_neighbours_are_scattered():
    """The mean distance between the positions of two neighbours is a third of the size, as for random positions."""
    positions = list(map(Shuffle(10_000, (1,)), range(10_000)))
    distances = [abs(a - b) for a, b in pairwise(positions)]
    assert sum(distances) / len(distances) == pytest.approx(3333, rel=0.05)


def test_a_large_permutation_needs_no_memory():
    shuffle = Shuffle(10**12, (3,))
    assert len({shuffle(position) for position in range(1000)}) == 1000


def test_a_position_outside_of_the_range_is_an_error():
    with pytest.raises(IndexError):
        Shuffle(3, (1,))(3)


def test_keyed_numbers_are_even_and_never_change():
    counts = Counter(keyed_number(5, 1, "draw", step) for step in range(10_000))
    assert all(abs(count - 2000) < 200 for count in counts.values())
    # BLAKE2b of "(17, 'draw', 3)": a change here would silently change every run's rows and sampled sub-networks.
    assert keyed_number(2**64, 17, "draw", 3) == int.from_bytes(bytes.fromhex("ccce85d5fb5115e9"), "little")
