"""Buffers are saved and restored bit for bit beside the shards; missing, changed and foreign ones are refused."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from sorted_ds.base.errors import UserError
from sorted_ds.checkpoint import Checkpoints, index
from sorted_ds.checkpoint.buffer_file import BUFFERS_FILE
from sorted_ds.checkpoint.identity import Identity
from sorted_ds.cluster.ranks import Ranks
from tests.checkpoint.fakes import FakeEngine, delayed_writes
from tests.spawn import on_ranks

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
STEP = "step_00000001"


def some_buffers(seed: int) -> dict[str, Tensor]:
    """Buffers of several types and shapes. Two of them share memory; one is transposed."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.rand(2, 5, generator=generator)
    return {
        "stem.bn.running_mean|d3-w48": shared[0],
        "stem.bn.running_mean|d3-w32": shared[0, :3],
        "stem.bn.num_batches_tracked": torch.tensor(2**40 + seed),
        "stem.bn.running_var": torch.rand(4, 3, generator=generator).t(),
        "half": torch.rand(3, generator=generator).to(torch.bfloat16),
        "mask": torch.rand(6, generator=generator) > 0.5,
        "empty": torch.zeros(0, 7, dtype=torch.float64),
    }


def copies(buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in buffers.items()}


def checkpoints(folder: Path, ranks: Ranks = ALONE, **settings) -> Checkpoints:
    return Checkpoints(folder, **{"keep_last": 2, "identity": Identity({"seed": "1"}), "ranks": ranks, **settings})


def save(folder: Path, buffers: dict[str, Tensor], step: int = 1, ranks: Ranks = ALONE, **settings) -> None:
    checkpoints(folder, ranks, **settings).save(FakeEngine(ranks, step, buffers), step)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def restored_message(folder: Path, buffers: dict[str, Tensor], **settings) -> str:
    """Returns the warnings of a start that restores into these buffers, or its error."""
    saved = checkpoints(folder, **settings)
    with mock.patch.object(index, "SECONDS_TO_APPEAR", 0.2):
        try:
            saved.restore_latest(FakeEngine(ALONE, 0, buffers))
        except UserError as error:
            return str(error)
    return "\n".join(saved.warnings)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_buffers_of_any_type_and_shape_are_restored_bit_for_bit(tmp_path, asynchronous):
    save(tmp_path, some_buffers(1), asynchronous=asynchronous)
    engine = FakeEngine(ALONE, 0, copies(some_buffers(2)))
    assert checkpoints(tmp_path).restore_latest(engine) == 1
    assert_equal(engine.buffers(), some_buffers(1))
    assert engine.weight.eq(1).all()
    assert engine.moment.eq(0.5).all()
    assert engine.is_published


def test_an_asynchronous_save_holds_the_buffers_as_they_were_when_it_began(tmp_path):
    buffers = some_buffers(1)
    saving = checkpoints(tmp_path)
    with delayed_writes() as event:
        saving.start_save(FakeEngine(ALONE, 1, buffers), 1)
        for value in buffers.values():
            value.zero_()
        event.set()
        saving.finish()
    engine = FakeEngine(ALONE, 0, copies(buffers))
    checkpoints(tmp_path).restore_latest(engine)
    assert_equal(engine.buffers(), some_buffers(1))


def test_a_model_without_buffers_has_no_file_of_them(tmp_path):
    save(tmp_path, {})
    assert sorted(path.name for path in (tmp_path / STEP).iterdir()) == [index.INDEX, "rank_0000.safetensors"]
    assert list(json.loads((tmp_path / STEP / index.INDEX).read_text())["files"]) == ["rank_0000.safetensors"]
    assert restored_message(tmp_path, {}) == ""


def without(buffers: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in buffers.items() if key != name}


@pytest.mark.parametrize(
    ("saved", "model", "difference"),
    [
        (without(some_buffers(1), "mask"), some_buffers(1), "mask is missing there, bool [6] here"),
        (some_buffers(1), without(some_buffers(1), "mask"), "mask is bool [6] there, missing here"),
        ({}, {"count": torch.tensor(3)}, "count is missing there, int64 [] here"),
        ({"count": torch.tensor(3)}, {"count": torch.zeros(2)}, "count is int64 [] there, floating-point [2] here"),
        ({"mean": torch.zeros(1, 2)}, {"mean": torch.zeros(2)}, "mean is floating-point [1, 2] there, fl"),
    ],
)
def test_buffers_that_are_not_the_models_are_refused_in_one_line(tmp_path, saved, model, difference):
    save(tmp_path, saved)
    before = copies(model)
    message = restored_message(tmp_path, model)
    assert message.startswith(f"{tmp_path / STEP} holds the buffers of another model: {difference}")
    assert "\n" not in message
    assert_equal(model, before)


def test_a_run_may_go_on_in_another_floating_point_precision(tmp_path):
    save(tmp_path, {"mean": torch.tensor([0.5, 2.0])})
    model = {"mean": torch.zeros(2, dtype=torch.bfloat16)}
    assert restored_message(tmp_path, model) == ""
    assert model["mean"].tolist() == [0.5, 2.0]


def remove(path: Path) -> None:
    path.unlink()


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("damage", "reason"), [(remove, " is missing"), (flip_a_bit, " has changed since it was wr")])
def test_a_checkpoint_with_damaged_buffers_is_renamed_and_the_one_before_it_restored(tmp_path, damage, reason):
    for step in (1, 2):
        save(tmp_path, some_buffers(step), step)
    damage(tmp_path / "step_00000002" / BUFFERS_FILE)
    buffers = copies(some_buffers(3))
    assert f"step_00000002/{BUFFERS_FILE}{reason}" in restored_message(tmp_path, buffers)
    assert_equal(buffers, some_buffers(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged_step_00000002", STEP]


def test_a_save_fails_when_there_is_no_memory_for_the_buffers(tmp_path):
    full = mock.Mock()
    full.detach.return_value.to.side_effect = RuntimeError("not enough memory")
    with pytest.raises(UserError, match=r"step 1: .* no host memory for a copy of the model's buffers: not enough"):
        save(tmp_path, {"mean": full})
    assert list(tmp_path.iterdir()) == []


def save_on_ranks(ranks: Ranks, folder: str) -> None:
    save(Path(folder), some_buffers(1), ranks=ranks)


def restore_on_ranks(ranks: Ranks, folder: str) -> None:
    engine = FakeEngine(ranks, 0, copies(some_buffers(2)))
    checkpoints(Path(folder), ranks).restore_latest(engine)
    assert_equal(engine.buffers(), some_buffers(1))
    assert engine.weight.eq(1).all()


def test_rank_0_alone_writes_the_buffers_and_any_number_of_ranks_restores_them(tmp_path):
    on_ranks(2, save_on_ranks, str(tmp_path / "run"), folder=tmp_path / "saving")
    names = sorted(path.name for path in (tmp_path / "run" / STEP).iterdir())
    assert names == [BUFFERS_FILE, index.INDEX, "rank_0000.safetensors", "rank_0001.safetensors"]
    on_ranks(3, restore_on_ranks, str(tmp_path / "run"), folder=tmp_path / "restoring")
