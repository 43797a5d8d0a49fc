"""What one rank can find out for all, the other ranks do not look up again."""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sorted_ds.run.model_config import config_of_json, json_of_config
from sorted_ds.run.parts import build_parts
from sorted_ds.run.run_file import load_run
from sorted_ds.run.train import shared_data
from sorted_ds.tasks import task_of
from tests.families import VARIANTS, tiny_config
from tests.launched import SETTINGS, run_dir, train_by_command
from tests.runs import run_file
from tests.spawn import on_ranks
from tests.trained import trained_run


@contextmanager
def file_operations() -> Iterator[Counter[str]]:
    """Counts the files that are opened, listed or asked for their size, by path."""
    counted: Counter[str] = Counter()
    is_on, stat = [True], os.stat

    def hear(event: str, args: tuple) -> None:
        if (
            is_on[0]
            and event in ("open", "os.listdir", "os.scandir")
            and isinstance(args[0], str | bytes | os.PathLike)
        ):
            counted[os.fsdecode(args[0])] += 1

    def counted_stat(path, *args, **kwargs):
        if isinstance(path, str | bytes | os.PathLike):
            counted[os.fsdecode(path)] += 1
        return stat(path, *args, **kwargs)

    sys.addaudithook(hear)
    os.stat = counted_stat
    try:
        yield counted
    finally:
        os.stat, is_on[0] = stat, False


def operations_at_the_start(ranks, run_path: Path) -> list[dict[str, int]]:
    """The file operations of each rank, from the run file to the restored checkpoint."""
    with file_operations() as counted:
        run = load_run(run_path, SETTINGS)
        task = task_of(run.task)
        parts = build_parts(run, task, shared_data(run, task, ranks), ranks, lambda: None)
        assert parts.first_step == 8
    return [json.loads(text) for text in ranks.gather(json.dumps(counted))]


@pytest.mark.long
@pytest.mark.ci
def test_only_one_rank_walks_the_text_and_looks_at_every_file(tmp_path):
    run = run_file(tmp_path)
    trained_run(tmp_path / "base", vocab_size=131)
    text = run.read_text()
    start, stop = text.index("[model]"), text.index("[sampling]")
    space = "[space]\ndepths = [1, 4]\ngroups = [1, 4]\nffn = [32, 112]\n"
    run.write_text(f'{text[:start]}[model]\ninit = "base/model"\n{space}{text[stop:]}')
    train_by_command(run)
    first, second = on_ranks(2, operations_at_the_start, run, folder=tmp_path / "ranks")

    def below(folder: Path, counted: dict[str, int]) -> Counter[str]:
        inside = {Path(path).name: number for path, number in counted.items() if folder in Path(path).parents}
        return Counter(inside)

    assert len(below(tmp_path / "text", first)) == 30
    assert not below(tmp_path / "text", second)
    base = tmp_path / "base" / "model"
    assert {"tokenizer.json", "config.json", "model.safetensors"} <= below(base, first).keys()
    weights = {"config.json", "generation_config.json", "model.safetensors", "owned.safetensors"}
    assert below(base, second).keys() <= {*weights, "model.safetensors.index.json"}, "what it loads itself"
    checkpoint = run_dir(run) / "checkpoints" / "step_00000008"
    assert below(checkpoint, first)["checkpoint.json"]
    assert set(below(checkpoint, second)) == {"rank_0001.safetensors"}, "its own file, which it reads"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_config_comes_through_unchanged(variant, tmp_path):
    run = load_run(run_file(tmp_path))
    config = tiny_config(variant)
    assert config_of_json(run, json_of_config(config)).to_dict() == config.to_dict()
