"""Rows and targets equal plain Python packing. A step's rows follow from seed and step, on any number of ranks."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from sorted_ds.base.errors import UserError
from sorted_ds.data.loader import Loader, MicroBatch, deal, validation_batches
from sorted_ds.data.rows import Cut, PackedRows, cut_of
from tests.batches import TASK

ROW_TOKENS = 5
NUM_ROWS = 23
TOKENS = np.arange(100, 100 + NUM_ROWS * ROW_TOKENS + 3, dtype="<u2")
"""Each id occurs once, so that a row's first id tells which row it is."""

NUM_SHARES = 3


def packed() -> PackedRows:
    return PackedRows(TOKENS, ROW_TOKENS)


def collate(rows, size: int) -> MicroBatch:
    return TASK.collate(rows, size, ROW_TOKENS)


def loader(rank: int = 0, world_size: int = 1, **changes) -> Loader:
    settings = {"seed": 17, "step_rows": 12, "micro_batch_rows": 2, **changes}
    return Loader(packed(), collate, rank=rank, world_size=world_size, **settings)


def rows_in(batches: list[MicroBatch]) -> list[int]:
    """Checks the contents of the real rows, and returns their numbers."""
    found = []
    for batch in batches:
        real = [
            (ids, labels)
            for ids, labels in zip(batch.inputs["input_ids"], batch.inputs["labels"], strict=True)
            if labels[0] != -100
        ]
        assert batch.num_rows == len(real)
        assert batch.num_targets == int((batch.inputs["labels"] != -100).sum())
        for ids, labels in real:
            row = (int(ids[0]) - 100) // ROW_TOKENS
            assert ids.tolist() == [100 + row * ROW_TOKENS + k for k in range(ROW_TOKENS)]
            assert labels.tolist() == [101 + row * ROW_TOKENS + k for k in range(ROW_TOKENS)]
            found.append(row)
    return found


@pytest.mark.parametrize("num_tokens", [6, 10, 11, 12, 116])
def test_rows_are_the_text_cut_every_row_tokens_and_each_position_has_a_target(num_tokens):
    plain = list(range(num_tokens))
    expected = [plain[k : k + 6] for k in range(0, num_tokens, 5) if k + 6 <= num_tokens]
    rows = PackedRows(np.array(plain, dtype="<u4"), 5)
    assert [rows[k].ids.tolist() for k in range(len(rows))] == expected
    assert rows[0].ids.dtype == np.int64
    assert all(rows[k].is_target.all() for k in range(len(rows)))


def test_a_text_shorter_than_one_row_is_refused():
    with pytest.raises(
        UserError, match=r"batch\.row_tokens = 5 is too long: the training text has 5 tokens, and one row needs 6"
    ):
        PackedRows(np.arange(5), 5)


def whole_document(marks: list[int], tokens: int, isolate: bool = False) -> PackedRows:
    return PackedRows(np.arange(tokens), 3, marks=np.array(marks, np.uint8), isolate=isolate)


def test_marks_decide_what_is_learned_and_rows_without_a_target_are_left_out():
    #        0  1  2 | 3  4  5 | 6  7  8 | 9, and the first token of the next row is the target of the last one
    marks = [3, 0, 0, 0, 0, 0, 0, 2, 1, 1]
    rows = whole_document(marks, 10)
    assert [rows[k].ids.tolist() for k in range(len(rows))] == [[6, 7, 8, 9]], "token 0 is never predicted"
    assert rows[0].is_target.tolist() == [False, False, True, True]
    assert rows[0].begins.tolist() == [False, True, False, False]
    assert rows[0].positions is None
    expected = Cut(documents=2, longer=1, cut=2, rows=1, without_target=2)
    assert cut_of(rows) == expected
    with pytest.raises(UserError, match=r"none of the 3 training rows has an answer\. Use more text, or longer rows\."):
        whole_document([3, *[0] * 9], 10)


def test_isolated_documents_have_positions_of_their_own_and_their_first_token_is_not_learned():
    rows = whole_document([3, 1, 1, 1, 3, 1, 3, 1, 1, 3], 10, isolate=True)
    found = [(row.positions.tolist(), row.is_target[1:].tolist()) for row in (rows[k] for k in range(3))]
    assert found == [([0, 1, 2], [True] * 3), ([0, 0, 1], [False, True, False]), ([0, 1, 2], [True, True, False])]
    assert len(whole_document([2, 0, 0, 3, 0, 0, 3, 0, 0, 1], 10, isolate=True)) == 1
    text = PackedRows(np.array([7, 7, 9, 7, 9, 7, 7]), 3, eos_id=9, isolate=True)
    assert [text[k].positions.tolist() for k in range(2)] == [[0, 1, 2], [0, 1, 0]]
    assert [text[k].is_target[1:].tolist() for k in range(2)] == [[True, True, False], [True, False, True]]


def test_a_row_out_of_range_raises():
    for row in (-1, NUM_ROWS):
        with pytest.raises(IndexError):
            packed()[row]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((32, 4, 4, 1), (8, 2, 4, 0.0)),
        ((32, 4, 4, 2), (8, 1, 4, 0.0)),
        ((32, 4, 4, 3), (8, 1, 3, 1 / 9)),
        ((12, 1, 5, 1), (12, 3, 4, 0.0)),  # three forwards of 4 rows, not of 5, 5 and 2
        ((2, 1, 4, 3), (2, 1, 1, 1 / 3)),
        ((10, 1, 3, 2), (10, 2, 3, 1 / 6)),
    ],
)
def test_rows_are_dealt_in_the_fewest_forwards_and_the_smallest_shape(arguments, expected):
    dealt = deal(*arguments)
    assert (dealt.rows_per_share, dealt.forwards, dealt.rows_per_forward) == expected[:3]
    assert dealt.padded_fraction == pytest.approx(expected[3])


@pytest.mark.parametrize(("step_rows", "num_shares", "nearest"), [(250, 4, "248, 252"), (3, 4, "4"), (7, 2, "6, 8")])
def test_a_step_whose_shares_would_have_different_numbers_of_rows_is_refused(step_rows, num_shares, nearest):
    with pytest.raises(UserError) as raised:
        deal(step_rows, num_shares, 4, 1)
    shares = f"{num_shares} equal shares (sampling.subnets_per_step / sampling.subnets_per_share)"
    cannot = f"batch.step_rows = {step_rows} cannot be cut into {shares}."
    assert str(raised.value) == f"{cannot} Nearest that can: {nearest}."


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_the_rows_of_a_sample_do_not_depend_on_the_number_of_ranks(world_size):
    alone = loader()
    ranks = [loader(rank, world_size) for rank in range(world_size)]
    for step in range(9):
        per_rank = [one.batches(step, NUM_SHARES) for one in ranks]
        for sample, expected in enumerate(alone.batches(step, NUM_SHARES)):
            union = [row for batches in per_rank for row in rows_in(batches[sample])]
            assert sorted(union) == sorted(rows_in(expected))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_every_rank_runs_the_same_number_of_forwards_of_the_same_shape(world_size):
    dealt = deal(12, 3, 2, world_size)
    real = 0
    for rank in range(world_size):
        shares = loader(rank, world_size).batches(3, NUM_SHARES)
        assert [len(share) for share in shares] == [dealt.forwards] * 3
        for batch in (batch for share in shares for batch in share):
            assert (
                batch.inputs["input_ids"].shape == batch.inputs["labels"].shape == (dealt.rows_per_forward, ROW_TOKENS)
            )
            assert (batch.inputs["input_ids"].dtype, batch.inputs["labels"].dtype) == (torch.int64, torch.int64)
            assert batch.inputs["input_ids"][batch.num_rows :].eq(0).all()
            assert batch.inputs["labels"][batch.num_rows :].eq(-100).all()
            real += batch.num_rows
    run = world_size * 3 * dealt.forwards * dealt.rows_per_forward
    assert 1 - real / run == pytest.approx(dealt.padded_fraction)


def test_an_epoch_has_each_row_once_and_each_epoch_has_another_order():
    one = loader(step_rows=6)
    trained = [row for step in range(23) for sample in one.batches(step, NUM_SHARES) for row in rows_in(sample)]
    epochs = [trained[start : start + NUM_ROWS] for start in range(0, 6 * NUM_ROWS, NUM_ROWS)]
    assert all(sorted(epoch) == list(range(NUM_ROWS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert list(range(NUM_ROWS)) not in epochs


def test_the_shares_of_a_step_take_consecutive_positions():
    one = loader()
    assert [rows_in(sample) for sample in one.batches(5, NUM_SHARES)] == [
        [one.order.row_at(5 * 12 + sample * 4 + k) for k in range(4)] for sample in range(3)
    ]


def test_a_steps_rows_follow_from_seed_and_step_alone():
    used = loader()
    for step in range(8):
        used.batches(step, NUM_SHARES)
    again = [rows_in(sample) for sample in loader().batches(7, NUM_SHARES)]
    assert [rows_in(sample) for sample in used.batches(7, NUM_SHARES)] == again
    assert [rows_in(sample) for sample in loader(seed=18).batches(7, NUM_SHARES)] != again


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_rows", [1, 5, 22, 23, 1000])
def test_validation_rows_are_spread_evenly_and_dealt_over_the_ranks(num_rows, world_size):
    shares = [list(validation_batches(packed(), collate, num_rows, 3, rank, world_size)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert len({batch.inputs["input_ids"].shape for share in shares for batch in share}) == 1
    found = sorted(row for share in shares for row in rows_in(share))
    number = min(num_rows, NUM_ROWS)
    assert found == [int(k * NUM_ROWS / number) for k in range(number)]
    gaps = {after - before for before, after in pairwise(found)}
    assert max(gaps, default=0) - min(gaps, default=0) <= 1
