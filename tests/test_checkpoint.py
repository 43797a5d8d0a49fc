"""Checkpoints on real ranks: bit-equal resume, other numbers of ranks and stages, and what a damaged one says."""

import json
import resource
from pathlib import Path

import pytest
import torch

from sorted_ds.checkpoint import INDEX, Checkpoints, read_master_weights
from sorted_ds.engine import Engine
from sorted_ds.errors import UserError
from sorted_ds.nested import nest
from tests import exactness
from tests.exactness import SPACE, Case
from tests.spawn import on_ranks

DRAW_ROWS = 6
"""Rows of a draw: can be dealt to 1, 2 and 3 ranks."""
SUBNETS = [SPACE[name] for name in ("d3-g4-f64", "d1-g1-f16", "d2-g2-f32", "d3-g1-f16", "d1-g4-f64")]


def train(ranks, case: Case, folder: str, first_step: int, last_step: int, fingerprint=None) -> dict:
    """Steps `first_step` to `last_step`, from the newest checkpoint if there is one; saves after the last."""
    engine = Engine(nest(exactness.plain_model(case), SPACE), case.deepspeed(), "test.json", case.optim, 2, ranks)
    engine.warm_up(2, exactness.ROW_TOKENS)
    checkpoints = Checkpoints(Path(folder), 2, fingerprint or {"seed": "1"}, ranks)
    assert checkpoints.restore_latest(engine) == first_step
    for step in range(first_step, last_step):
        for draw in range(2):
            ids, labels = rows(step, draw, ranks)
            num_targets = 2 * DRAW_ROWS * exactness.ROW_TOKENS
            engine.backward(engine.forward(ids, labels, SUBNETS[(step + 3 * draw) % len(SUBNETS)]) / num_targets)
        engine.step(0.01 / (step + 1))
    checkpoints.save(engine, last_step)
    return exactness.gather_masters(engine, ranks)


def rows(step: int, draw: int, ranks) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's rows: the same ones over all ranks, whatever their number."""
    generator = torch.Generator().manual_seed(1000 * step + draw)
    ids = torch.randint(0, exactness.VOCAB, (DRAW_ROWS, exactness.ROW_TOKENS + 1), generator=generator)
    own = ids[ranks.rank :: ranks.size]
    return own[:, :-1], own[:, 1:]


def continued(folder: Path, first: tuple[int, Case], second: tuple[int, Case]) -> dict:
    on_ranks(first[0], train, first[1], str(folder / "run"), 0, 5, folder=folder / "first")
    return on_ranks(second[0], train, second[1], str(folder / "run"), 5, 10, folder=folder / "second")


MODES = [Case(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
MODES += [Case(3, precision, default_thresholds=True) for precision in ("fp32", "bf16")]
MODES += [Case(3, sub_group_size=1500), Case(2, offload=True), Case(3, "bf16", offload=True)]
MODES += [Case(2, optimizer="fused"), Case(3, offload=True, offload_param=True)]
MODES += [Case(stage, optimizer="cpu_adam", offload=True) for stage in (1, 3)]


def both_ways(ranks, cases: list[Case], folder: str) -> dict[str, tuple[dict, dict]]:
    """Of each case: ten steps at once, and five and five."""
    results = {}
    for case in cases:
        whole = train(ranks, case, f"{folder}/{case.name}/whole", 0, 10)
        train(ranks, case, f"{folder}/{case.name}/halves", 0, 5)
        results[case.name] = (whole, train(ranks, case, f"{folder}/{case.name}/halves", 5, 10))
    return results


def test_five_and_five_steps_equal_ten_bit_for_bit(tmp_path):
    results = on_ranks(2, both_ways, MODES, str(tmp_path / "runs"), folder=tmp_path)
    for name, (whole, halves) in results.items():
        assert all(torch.equal(whole[key], halves[key]) for key in whole), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return on_ranks(2, train, Case(2), str(folder / "run"), 0, 10, folder=folder)


CHANGES = {
    "1 rank after 2": ((2, Case(2)), (1, Case(2))),
    "2 ranks after 1": ((1, Case(2)), (2, Case(2))),
    "3 ranks after 2": ((2, Case(2)), (3, Case(2))),
    "stage 3 on 3 ranks after stage 1 on 2": ((2, Case(1)), (3, Case(3))),
    "stage 0 after stage 3": ((2, Case(3)), (2, Case(0))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_number_of_ranks_or_stage_continues_to_rounding(tmp_path, uninterrupted, change):
    weights = continued(tmp_path, *CHANGES[change])
    assert exactness.largest_difference(weights, uninterrupted) <= 5e-5  # AdamW's amplified rounding, as in exactness


@pytest.fixture
def saved(tmp_path) -> Path:
    """Two checkpoints of a run on one rank, at steps 5 and 10."""
    continued(tmp_path, (2, Case(2)), (2, Case(2)))
    return tmp_path / "run"


def restore(ranks, folder: str, fingerprint: dict) -> str:
    engine = Engine(nest(exactness.plain_model(Case(2)), SPACE), Case(2).deepspeed(), "t.json", Case(2).optim, 2, ranks)
    try:
        Checkpoints(Path(folder), 2, fingerprint, ranks).restore_latest(engine)
    except UserError as error:
        return str(error)
    return ""


def test_damage_and_other_runs_are_named_in_one_line(tmp_path, saved):
    newest = saved / "step_00000010"
    shard = newest / "rank_0001.safetensors"
    content = shard.read_bytes()

    def message(fingerprint=None) -> str:
        return on_ranks(2, restore, str(saved), fingerprint or {"seed": "1"}, folder=tmp_path / "restore")

    assert message() == ""
    assert "another run: seed = 1 there, 2 here" in message({"seed": "2"})
    shard.write_bytes(content[:-8])
    assert f"has {len(content) - 8} bytes, {len(content)} were written" in message()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "was changed since it was written" in message()
    shard.unlink()
    assert "rank_0001.safetensors is missing. Delete step_00000010" in message()
    index = (newest / INDEX).read_text()
    (newest / INDEX).write_text(index[:-20])
    assert "checkpoint.json is damaged" in message()
    (newest / INDEX).write_text(index.replace('"format": 1', '"format": 99'))
    assert "is of format 99, and this version reads 1" in message()
    (newest / INDEX).unlink()
    assert "has no checkpoint.json" in message()


def test_old_checkpoints_go_and_the_last_ones_stay(saved, tmp_path):
    on_ranks(2, train, Case(2), str(saved), 10, 12, folder=tmp_path / "third")
    assert [path.name for path in sorted(saved.iterdir())] == ["step_00000010", "step_00000012"]
    assert json.loads((saved / "step_00000012" / INDEX).read_text())["step"] == 12


def restore_from_folders(ranks, folders: list[str]) -> str:
    """Each rank looks into a folder of its own."""
    return restore(ranks, folders[ranks.rank], {"seed": "1"})


def test_ranks_that_see_different_checkpoints_are_one_error_and_no_hang(saved, tmp_path):
    message = on_ranks(2, restore_from_folders, [str(saved), str(tmp_path / "absent")], folder=tmp_path / "restore")
    assert "rank 1 sees the checkpoint none as the newest, rank 0 step_00000010" in message


def save_with_little_room(ranks, folder: str) -> str:
    """Rank 1 may write no file over 1,000 bytes, as on a full disk."""
    case = Case(2)
    engine = Engine(nest(exactness.plain_model(case), SPACE), case.deepspeed(), "t.json", case.optim, 2, ranks)
    checkpoints = Checkpoints(Path(folder), 2, {"seed": "1"}, ranks)
    checkpoints.restore_latest(engine)
    if ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        checkpoints.save(engine, 15)
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return ""


def test_a_failing_write_leaves_the_last_good_checkpoint_and_says_so_on_all_ranks(saved, tmp_path):
    message = on_ranks(2, save_with_little_room, str(saved), folder=tmp_path / "full")
    assert message.startswith("step 15: the checkpoint could not be written: rank 1: rank_0001.safetensors")
    assert message.endswith(f"Last good checkpoint: {saved / 'step_00000010'}.")
    assert [path.name for path in sorted(saved.iterdir())] == ["step_00000005", "step_00000010"]


def test_a_checkpoint_s_master_weights_can_be_read_alone(saved):
    weights = read_master_weights(saved / "step_00000010")
    assert sum(map(len, weights.values())) == sum(
        p.numel() for p in nest(exactness.plain_model(Case(2)), SPACE).parameters()
    )
