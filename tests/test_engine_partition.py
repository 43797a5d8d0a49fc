"""ZeRO-3 from the first parameter on: the same run bit for bit, and no rank ever holds the model."""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from sorted_ds.assemble import load_model
from sorted_ds.engine import Engine, partitioner
from sorted_ds.errors import UserError
from sorted_ds.nested import extract
from sorted_ds.nested.load import build
from sorted_ds.resolve import space_of
from sorted_ds.run_file import load_run
from sorted_ds.space import SubNetSpace
from tests import exactness
from tests.exactness import LARGE, SPACE, VOCAB, Case, plain_model
from tests.live_bytes import LiveBytes
from tests.runs import run_file
from tests.spawn import on_ranks
from tests.test_engine_traces import held_by

CASES = [
    Case(3),
    Case(3, "bf16", "sgd", tied=True),
    Case(3, default_thresholds=True, tied=True),
    Case(3, prefetch=2_000, checkpointing=True, sub_group_size=1500),
    Case(3, offload=True),
]
NUM_STEPS = 3


def engine_of(ranks, case: Case, source: str, whole_first: bool) -> Engine:
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    take = None if whole_first else partitioner(case.deepspeed(), exactness.ROWS_PER_RANK, case.clip_norm, ranks)
    path = Path(source) if source else None
    model = build(plain_model(case).config, SPACE, path, 3, dtype, take=take)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Engine(model, case.deepspeed(), "test.json", case.optim, exactness.ROWS_PER_RANK, ranks)


def trained(ranks, cases: list[Case], sources: dict[Case, str]) -> dict:
    """Of each case and source: weights before, master weights and norms after training, for either way to build."""
    found = {}
    for case in cases:
        for source in ("", sources[case]):
            both = []
            for whole_first in (False, True):
                engine = engine_of(ranks, case, source, whole_first)
                before = dict(engine.weights())
                seen = exactness._train(engine, ranks, case, NUM_STEPS)
                both.append((before, exactness.gather_masters(engine, ranks), dict(engine.weights()), seen["norms"]))
            found[case.name, bool(source)] = both
    return found


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[Case, str]:
    folder = tmp_path_factory.mktemp("sources")
    for tied in (False, True):
        plain_model(Case(3, tied=tied)).save_pretrained(folder / str(tied), max_shard_size="20KB")
        assert len(list((folder / str(tied)).glob("model-*.safetensors"))) > 3
    return {case: str(folder / str(case.tied)) for case in CASES}


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_training_is_bit_equal_to_that_of_a_model_partitioned_whole(sources, tmp_path, num_ranks):
    cases = CASES if num_ranks == 2 else CASES[1:2]  # 3 ranks: no parameter divides evenly
    found = on_ranks(num_ranks, trained, cases, sources, folder=tmp_path)
    assert len(found) == 2 * len(cases)
    for (name, from_file), (ours, theirs) in found.items():
        for ours_of, theirs_of in zip(ours[:3], theirs[:3], strict=True):
            assert list(ours_of) == list(theirs_of)
            assert all(torch.equal(ours_of[key], theirs_of[key]) for key in ours_of), (name, from_file)
        assert ours[3] == theirs[3]
        assert not torch.equal(ours[0]["model.norm.weight"].float(), ours[1]["model.norm.weight"])


def saved_by_a_first_engine(ranks, case: Case) -> tuple[int, int, str]:
    """Saved tensors (test_engine_traces), and whose F.linear runs, where no engine was before in the process."""
    engine = engine_of(ranks, case, "", whole_first=False)
    engine.warm_up(2, exactness.ROW_TOKENS)
    return *held_by(engine), torch.nn.functional.linear.__module__


def test_saved_tensors_hold_no_gathered_weight_and_plain_linears_neither(tmp_path):
    released, kept, linear = on_ranks(2, saved_by_a_first_engine, Case(3), folder=tmp_path)
    assert released > 60
    assert kept == 0
    assert linear.startswith("deepspeed."), "torch's own saves views of gathered weights"


def sized(num_layers: int) -> LlamaConfig:
    """The embedding is the largest tensor, whatever the depth."""
    return LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    )


def built(ranks, sources: dict[int, str]) -> dict:
    """Of each depth, source and dtype, the worst rank's bytes: live at most, and after building."""
    found = {}
    for num_layers, source in sources.items():
        space = SubNetSpace.grid(depths=[1, num_layers], groups=[1, 2], ffn=[32, 128])
        for path in (None, Path(source)):
            for dtype in (torch.float32, torch.bfloat16):
                config = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": dtype is torch.bfloat16}}
                take = partitioner(config, 2, 1.0, ranks)
                with LiveBytes() as live:
                    model = build(sized(num_layers), space, path, 0, dtype, take=take)
                    everyone = ranks.gather(f"{live.peak} {live.now}")
                    del model
                found[num_layers, path is not None, dtype] = [max(map(int, c)) for c in zip(*map(str.split, everyone))]
    return found


@pytest.fixture(scope="module")
def built_bytes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    for num_layers in (2, 8):
        LlamaForCausalLM(sized(num_layers)).save_pretrained(folder / str(num_layers), max_shard_size="100KB")
    sources = {num_layers: str(folder / str(num_layers)) for num_layers in (2, 8)}
    return {n: on_ranks(n, built, sources, folder=folder / f"on{n}") for n in (2, 3)}


def test_print(built_bytes):
    for n, found in built_bytes.items():
        for key, (peak, now) in found.items():
            with torch.device("meta"):
                numel = sum(p.numel() for p in LlamaForCausalLM(sized(key[0])).parameters())
            print(n, key, peak, now, numel * key[2].itemsize, 512 * 64 * 4)
    assert 0
