"""A mixture keeps its shares after every step, reads each source in epochs, and follows from (seed, step) alone."""

import random
from fractions import Fraction

import numpy as np
import pytest

from sorted_ds.base.errors import UserError
from sorted_ds.data.loader import Loader
from sorted_ds.data.mixture import LONGEST_PERIOD, JoinedRows, Mixture, Pattern, Shuffled

WEIGHTS = [
    (1.0,),
    (0.7, 0.3),
    (1, 1, 1, 1, 1),
    (0.333, 0.333, 0.334),
    (5, 0, 0.25),
    (0.01, 0.02, 0.03, 0.94),
    *[tuple(random.Random(n).randint(1, 60) for _ in range(n)) for n in (2, 3, 4, 7, 12, 30)],
]
NUM_ROWS = {"web": 100, "code": 37, "chat": 11}
PHASES = {0: (0.5, 0.3, 0.2), 6: (0.2, 0.2, 0.6), 20: (0, 1, 1)}
STEPS, STEP_ROWS = 40, 12


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_prefix_is_within_one_row_of_each_share(weights):
    pattern = Pattern(weights)
    total = sum(Fraction(str(weight)) for weight in weights)
    shares = np.array([float(Fraction(str(weight)) / total) for weight in weights])
    sources = np.tile(pattern.sources, 2)
    counts = np.cumsum(np.eye(len(weights), dtype=int)[sources], axis=0)
    expected = np.arange(1, len(sources) + 1)[:, None] * shares
    assert np.abs(counts - expected).max() < 1
    for row in (0, 1, pattern.period - 1, pattern.period, 2 * pattern.period - 1):
        assert [pattern.before(row, source) for source in range(len(weights))] == np.bincount(
            sources[:row], minlength=len(weights)
        ).tolist()


def test_too_many_digits_are_refused():
    with pytest.raises(UserError, match=r"repeat after 10,000,000 rows only, and a mixture may take 100,000"):
        Pattern([0.1234567, 0.8765433])
    assert Pattern([0.12345, 0.87655]).period <= LONGEST_PERIOD


def mixture(seed: int = 3) -> Mixture:
    return Mixture(NUM_ROWS, PHASES, seed, STEP_ROWS)


def source_and_row(number: int) -> tuple[str, int]:
    for name, size in NUM_ROWS.items():
        if number < size:
            return name, number
        number -= size
    raise AssertionError


def test_after_each_step_every_source_had_its_share_and_no_row_comes_twice_before_all_have_come():
    order, rows = mixture(), {name: [] for name in NUM_ROWS}
    expected = dict.fromkeys(NUM_ROWS, 0.0)
    for step in range(STEPS):
        first = max(phase for phase in PHASES if phase <= step)
        for position in range(step * STEP_ROWS, (step + 1) * STEP_ROWS):
            name, row = source_and_row(order.row_at(position))
            rows[name].append(row)
        for name, weight in zip(NUM_ROWS, PHASES[first], strict=True):
            expected[name] += STEP_ROWS * weight / sum(PHASES[first])
            assert abs(len(rows[name]) - expected[name]) < 1 + list(PHASES).index(first)
        assert order.rows_of(step + 1) == {name: len(found) for name, found in rows.items()}
        counts = [np.bincount(rows[name], minlength=size) for name, size in NUM_ROWS.items()]
        assert all(own.max() - own.min() <= 1 for own in counts)
    assert len(rows["chat"]) > 3 * NUM_ROWS["chat"]


def test_the_order_follows_from_seed_and_position_alone():
    positions = list(range(STEPS * STEP_ROWS))
    forward = [mixture().row_at(position) for position in positions]
    assert forward == [mixture().row_at(position) for position in reversed(positions)][::-1]
    assert forward != [mixture(seed=4).row_at(position) for position in positions]


def test_no_place_of_a_step_always_has_the_same_source():
    """The first rows of a step are those of the full network in a sandwich."""
    order = Mixture({"a": 1000, "b": 1000}, {0: (1, 1)}, 3, 8)
    for place in range(8):
        share = sum(order.row_at(step * 8 + place) < 1000 for step in range(200)) / 200
        assert 0.35 < share < 0.65


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_read_the_rows_of_the_mixture_between_them(world_size):
    sources = {name: [(name, row) for row in range(size)] for name, size in NUM_ROWS.items()}
    rows = JoinedRows(sources)
    assert [rows[number] for number in range(len(rows))] == [row for own in sources.values() for row in own]
    assert [rows.name_of(number) for number in (0, 99, 100, 136, 137, 147)] == ["web"] * 2 + ["code"] * 2 + ["chat"] * 2
    expected = [source_and_row(mixture().row_at(position)) for position in range(24, 36)]
    found = []
    for rank in range(world_size):
        loader = Loader(rows, lambda rows, size: rows, 3, STEP_ROWS, 3, rank, world_size, mixture())
        found += [row for share in loader.batches(2, 2) for batch in share for row in batch]
    assert sorted(found) == sorted(expected)


def test_one_source_alone_keeps_the_order_of_earlier_versions():
    """The order of a run without a mixture is part of what it resumes to."""
    assert [Shuffled(10, 17).row_at(position) for position in range(20)] == EARLIER


EARLIER = [2, 6, 9, 5, 7, 0, 4, 1, 3, 8, 2, 0, 6, 7, 9, 4, 1, 5, 3, 8]
