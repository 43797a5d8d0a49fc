"""On real ranks a run resumes bit for bit; saving does not disturb it; ranks, stage and space may change."""

import json
import os
import stat
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from sorted_ds.base.errors import AgreedError, UserError
from sorted_ds.checkpoint.background import Task, wait_for_ranks
from sorted_ds.checkpoint.folders import num_blocks
from sorted_ds.checkpoint.shard_files import require_finite
from tests import exactness, resumed
from tests.checkpoint.fakes import delayed_writes
from tests.exactness import MOMENTS, SPACE, Case
from tests.resumed import HALF, PART, STEPS, Leg, Trainer
from tests.spawn import on_ranks

MODES = [Case(1), Case(3), Case(2, "bf16"), Case(3, offload=True, offload_param=True)]
OTHER_MODES = [Case(0), Case(2), Case(3, default_thresholds=True), Case(3, "bf16", offload=True)]
OTHER_MODES += [*(Case(stage, "bf16") for stage in (0, 1, 3)), Case(3, "bf16", default_thresholds=True)]
OTHER_MODES += [Case(3, sub_group_size=1500), Case(2, offload=True), Case(2, optimizer="fused")]
OTHER_MODES += [Case(stage, optimizer="cpu_adam", offload=True) for stage in (1, 3)]
LEGS = [*(Leg(case, micro_batch_rows=6) for case in MODES), Leg(Case(2), asynchronous=False)]
OTHER_LEGS = [Leg(case, micro_batch_rows=6) for case in OTHER_MODES]
BOUNDS = {"weights": 1e-5, "exp_avg": 1e-5, "exp_avg_sq": 1e-5}
"""Largest differences that AdamW makes of rounding errors, as in tests/exactness.py."""


@pytest.mark.parametrize("legs", [LEGS, pytest.param(OTHER_LEGS, marks=pytest.mark.long)], ids=["core", "others"])
def test_a_run_resumed_from_a_checkpoint_written_during_training_equals_the_uninterrupted_run_bit_for_bit(
    tmp_path, legs
):
    results = on_ranks(2, resumed.uninterrupted_and_resumed, legs, str(tmp_path / "runs"), folder=tmp_path)
    assert len(results) == len(legs)
    for name, (whole, halves) in results.items():
        for kind in ("weights", *MOMENTS):
            assert all(torch.equal(whole[kind][key], halves[kind][key]) for key in whole[kind]), (name, kind)


SOURCES = {"stage1 on 2": (2, Leg(Case(1))), "stage3 on 3": (3, Leg(Case(3)))}
SOURCES |= {"offload on 1": (1, Leg(Case(2, offload=True), micro_batch_rows=12))}
TARGETS = [Leg(Case(0)), Leg(Case(1), 1), Leg(Case(2), 3), Leg(Case(3), 5)]
"""Stages and micro-batch sizes. With 5 rows, some micro-batches are not full."""


def train_first_half(ranks, legs: list[Leg], folders: list[str]) -> None:
    for leg, folder in zip(legs, folders, strict=True):
        resumed.train(ranks, leg, folder, 0, HALF)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    """Returns folders with a checkpoint of half the steps, by the mode that wrote it."""
    folder = tmp_path_factory.mktemp("sources")
    for name, (num_ranks, leg) in SOURCES.items():
        on_ranks(num_ranks, train_first_half, [leg], [str(folder / name)], folder=folder / "ranks")
    return {name: str(folder / name) for name in SOURCES}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return on_ranks(2, resumed.train, Leg(), str(folder / "run"), 0, STEPS, folder=folder)


@pytest.mark.parametrize("num_ranks", [1, *(pytest.param(number, marks=pytest.mark.long) for number in (2, 3, 4))])
def test_a_run_resumes_with_other_ranks_stages_and_micro_batches_on_the_same_rows_and_equal_to_rounding(
    sources, uninterrupted, tmp_path, num_ranks
):
    results = on_ranks(num_ranks, resumed.continue_each, sources, TARGETS, str(tmp_path / "runs"), folder=tmp_path)
    assert len(results) == len(SOURCES) * len(TARGETS)
    for name, found in results.items():
        assert found["rows"] == uninterrupted["rows"][HALF:], name
        assert found["samples"] == uninterrupted["samples"][HALF:], name
        for kind, bound in BOUNDS.items():
            assert exactness.largest_difference(found[kind], uninterrupted[kind]) <= bound, (name, kind)


def identity_facts(subnets: list[str]) -> dict[str, str]:
    """Returns what a run's identity says of a space with these sub-networks."""
    facts = {"seed": "1", "space.depths": "[]", "space.groups": "[]", "space.ffn": "[]"}
    return {**facts, "space.subnets": json.dumps(subnets)}


def extend(ranks, stage: int, folder: str) -> dict:
    """Trains half the steps in a part of the space, then the rest in the part and in the whole, with equal samples."""
    leg = Leg(Case(stage), space=PART, trained=PART)
    part, whole = (identity_facts([subnet.name for subnet in space]) for space in (PART, SPACE))
    before = resumed.train(ranks, leg, folder, 0, HALF, facts=part)
    larger = Leg(Case(stage), space=SPACE, trained=PART)
    refused = Trainer(ranks, larger, folder, facts=whole)
    try:
        refused.checkpoints.restore_latest(refused.engine)
        message = ""
    except UserError as error:
        message = str(error)
    grown = Trainer(ranks, larger, folder, facts=whole, extends_space=True)
    assert grown.checkpoints.restore_latest(grown.engine) == HALF
    restored, warnings = grown.result(), grown.checkpoints.warnings
    grown.train(HALF, STEPS)
    after = resumed.train(ranks, leg, folder, HALF, STEPS, facts=part)
    shrunk = Trainer(ranks, leg, f"{folder}/of_the_whole", facts=part)
    grown.checkpoints.folder = Path(f"{folder}/of_the_whole")
    grown.checkpoints.save(grown.engine, STEPS)
    try:
        shrunk.checkpoints.restore_latest(shrunk.engine)
    except UserError as error:
        message = f"{message}\n{error}"
    return {"before": before, "restored": restored, "part": after, "whole": grown.result()} | {
        "message": message,
        "warnings": warnings,
    }


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.long), 3])
def test_a_space_grows_only_if_asked_and_keeps_its_weights_and_moments(tmp_path, stage):
    found = on_ranks(2, extend, stage, str(tmp_path / "run"), folder=tmp_path)
    for kind in ("weights", *MOMENTS):
        same = found["before"][kind], found["restored"][kind]
        assert all(torch.equal(same[0][key], same[1][key]) for key in same[0]), kind
        assert exactness.largest_difference(found["part"][kind], found["whole"][kind]) <= BOUNDS[kind]
    refused, shrunk = found["message"].splitlines()
    assert "belongs to a run with 4 of this run's 27 sub-networks. To train the others too" in refused
    assert "belongs to a run whose space has d1-g1-f32 (23 in all), which this run's space does not have" in shrunk
    assert found["warnings"] == ["the space grows from 4 to 27 sub-networks"]


OTHERS_MAY_READ = 0o640


def save_late(ranks, folder: str) -> tuple[float, bool, bool]:
    """Delays the writing of a save.

    Returns how long training did not wait for it, whether it was invisible meanwhile, and whether the next save used
    the same memory.
    """
    os.umask(0o027)
    trainer = Trainer(ranks, Leg(), folder)
    checkpoints, engine = trainer.checkpoints, trainer.engine
    with delayed_writes() as event:
        checkpoints.start_save(engine, 1)
        hidden = not list(Path(folder).glob("step_*"))
        time.sleep(0.5)
        memory = checkpoints._staging._memory.data_ptr()
        event.set()
        saved = checkpoints.finish()[0]
    with suppress(AgreedError), checkpoints.finish_on_error():
        checkpoints.start_save(engine, 2)
        raise AgreedError("an error that all ranks raise")
    same_memory = checkpoints._staging._memory.data_ptr() == memory
    return saved.seconds - saved.pause_seconds, hidden, same_memory


def test_training_does_not_wait_for_writes_saves_share_one_copy_and_files_get_the_umask_s_mode(tmp_path):
    not_waited, hidden, same_memory = on_ranks(2, save_late, str(tmp_path / "run"), folder=tmp_path / "ranks")
    assert not_waited >= 0.4
    assert hidden
    assert same_memory
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run" / "step_00000002").iterdir()}
    assert modes == {OTHERS_MAY_READ}


def count_heartbeats(ranks, seconds: float, makes_progress: bool) -> int:
    """Returns the fewest heartbeats of a rank while rank 0 alone works."""
    heartbeats: list[float] = []
    began = time.monotonic()

    def progress() -> float:
        return makes_progress and ranks.is_first and time.monotonic() - began

    task = Task(lambda: time.sleep(seconds if ranks.is_first else 0))
    wait_for_ranks(ranks, task, progress, lambda: heartbeats.append(1))
    return min(int(count) for count in ranks.gather(str(len(heartbeats))))


def test_waiting_ranks_send_heartbeats_as_long_as_the_working_rank_makes_progress(tmp_path):
    assert on_ranks(2, count_heartbeats, 3.5, True, folder=tmp_path / "moving") >= 3
    assert on_ranks(2, count_heartbeats, 3.5, False, folder=tmp_path / "still") == 1


def test_progress_is_seen_while_a_file_of_full_size_is_filled(tmp_path):
    with (tmp_path / ".tmp").open("wb") as file:
        file.truncate(2**24)  # as safetensors does
        before = num_blocks(tmp_path)
        file.write(bytes(2**22))
        os.fsync(file.fileno())
        assert before < num_blocks(tmp_path) < 2**24 // 512


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_named(number):
    values = {
        "a|0|weight": torch.zeros(3),
        "b|4|exp_avg": torch.tensor([1.0, number, 0.0]),
        "c|0|weight": torch.zeros(0),
    }
    with pytest.raises(UserError, match=r"^exp_avg of b has a number that is not finite$"):
        require_finite(values)
    require_finite({key: value for key, value in values.items() if key[0] != "b"})
