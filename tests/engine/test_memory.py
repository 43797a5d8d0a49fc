"""Memory on real ranks: building at stage 3 without the whole model, and training against plain DeepSpeed.

Building: the same run bit for bit, no rank ever holds the model, and no rank waits for another that failed. One launch
of three ranks; the steps at each ZeRO stage in another one for each tier.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sorted_ds.base.errors import UserError
from sorted_ds.cluster.ranks import Ranks
from sorted_ds.engine import Engine, partitioner
from sorted_ds.engine.optimizers import build_optimizer
from sorted_ds.families import nest
from sorted_ds.nested.load import build
from sorted_ds.run import build as run_build
from sorted_ds.run.config import Optim
from sorted_ds.run.run_file import load_run
from sorted_ds.space import SubNet, SubNetSpace
from tests import exactness
from tests.batches import LLAMA, TASK, blank
from tests.engine.test_traces import held_by
from tests.exactness import ROWS_PER_RANK, SPACE, Case, plain_model
from tests.memory import NAMED, LiveBytes, StepBytes, of_plain, of_steps, of_subnets
from tests.runs import run_file
from tests.spawn import on_ranks
from tests.tiers import Tiers

NUM_RANKS = 3
NUM_STEPS = 2
TRAINED = [
    (Case(3), "scratch"),
    (Case(3, "bf16", "sgd", tied=True), "checkpoint"),
    (Case(3, default_thresholds=True, offload=True), "checkpoint"),
]
DEPTHS = (2, 8)
STAGES = (0, 1, 2, 3)
TIERS = Tiers(STAGES, first=(2, 3))
ROWS, ROW_TOKENS, VOCAB = 2, 48, 512
CHUNK_ROWS = 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def engine_of(ranks, case: Case, source: Path | None, whole_first: bool) -> Engine:
    on_filled = None if whole_first else partitioner(case.deepspeed(), ROWS_PER_RANK, case.clip_norm, ranks)
    model = build(LLAMA, plain_model(case).config, SPACE, source, 3, DTYPES[case.precision], on_filled=on_filled)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Engine(model, TASK, case.deepspeed(), "test.json", case.optim, ROWS_PER_RANK, ranks)


def saved_by_a_first_engine(ranks) -> tuple[int, int, str]:
    """Tensors that the full network saves, those that keep a weight, and whose F.linear runs."""
    engine = engine_of(ranks, Case(3), None, whole_first=False)
    engine.warm_up(blank(ROWS_PER_RANK, exactness.ROW_TOKENS))
    return *held_by(engine), torch.nn.functional.linear.__module__


def trained(ranks, case: Case, source: Path | None, whole_first: bool) -> dict:
    engine = engine_of(ranks, case, source, whole_first)
    before = dict(engine.weights())
    norms = exactness._train(engine, ranks, case, NUM_STEPS)["norms"]
    return {
        "before": before,
        "after": dict(engine.weights()),
        "masters": exactness.gather_masters(engine, ranks),
        "norms": {"all": torch.tensor(norms)},
    }


def sized(depth: int) -> LlamaConfig:
    """The embedding is the largest tensor, whatever the depth."""
    return LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
    )


def sized_space(depth: int) -> SubNetSpace:
    return SubNetSpace.grid(depths=[1, depth], groups=[1, 2], ffn=[32, 128])


def live_bytes(ranks, depth: int, source: Path | None, precision: str) -> tuple[int, int]:
    """Bytes of the rank that has most: at any time while it builds, and when it has built."""
    config = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": precision == "bf16"}}
    on_filled = partitioner(config, 2, 1.0, ranks)
    with LiveBytes() as live:
        model = build(LLAMA, sized(depth), sized_space(depth), source, 0, DTYPES[precision], on_filled=on_filled)
        told = [tuple(map(int, text.split())) for text in ranks.gather(f"{live.peak} {live.now}")]
    assert not any(p.is_meta for p in model.parameters())
    return max(peak for peak, _ in told), max(now for _, now in told)


def step_bytes(ranks, stage: int) -> dict[str, tuple[StepBytes, StepBytes]]:
    """For each named sub-network: the engine's bytes, and plain DeepSpeed's with the extracted model.

    The full network is also compared with plain DeepSpeed with our parameter groups, under "grouped"."""
    zero = {"stage": stage, "overlap_comm": False, **exactness.SMALL_ZERO, "reduce_bucket_size": 20_000}
    ids = torch.zeros(ROWS, ROW_TOKENS, dtype=torch.int64)
    space = sized_space(DEPTHS[0])
    with mock.patch("sorted_ds.tasks.losses.CHUNK_ELEMENTS", {"cpu": CHUNK_ROWS * VOCAB}):
        model = (ranks, sized(DEPTHS[0]), space)
        ours = of_subnets(*model, zero, ids)
        plain = partial(of_plain, *model, zero=zero, ids=ids)
        pairs = {name: (ours[name], plain(name=name)) for name in NAMED}
        return {**pairs, "grouped": (ours["full"], plain(name="full", grouped=True))}


def accumulated_bytes(ranks, stage: int) -> dict[str, StepBytes]:
    """Bytes of a step in which each pass uses more than the one before, and of one with the full network as often."""
    space = sized_space(DEPTHS[0])
    growing = [space.smallest, SubNet(d=DEPTHS[0], g=1, f=32), SubNet(d=DEPTHS[0], g=1, f=128), space.full]
    steps = {"growing": growing, "full": [space.full] * len(growing)}
    zero = {"stage": stage, "overlap_comm": False, **exactness.SMALL_ZERO, "reduce_bucket_size": 20_000}
    ids = torch.zeros(1, 16, dtype=torch.int64)
    return of_steps(ranks, sized(DEPTHS[0]), space, zero, ids, steps)


def owned_layers(ranks) -> list[list[float]]:
    """For each rank at stage 2: how much of each of eight layers, without a head, its part of the masters is."""
    config = sized(DEPTHS[1])
    config.tie_word_embeddings = True
    model = nest(LlamaForCausalLM(config), sized_space(DEPTHS[1]))
    layer_elements = sum(p.numel() for p in model.model.layers[0].parameters())
    engine = Engine(model, TASK, {"zero_optimization": {"stage": 2}}, "test.json", Optim(), ROWS, ranks)
    owned, prefix = [0.0] * DEPTHS[1], f"{LLAMA.layers}."
    for shard in engine.shards(disjoint=True):
        if shard.name.startswith(prefix):
            owned[int(shard.name.removeprefix(prefix).split(".")[0])] += shard.num / layer_elements
    return [[float(share) for share in text.split()] for text in ranks.gather(" ".join(map(str, owned)))]


def wide_step_bytes(ranks) -> dict[str, tuple[StepBytes, StepBytes]]:
    """At stage 3 with DeepSpeed's own limit of live parameters, of a network whose largest part is a layer's MLP."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
    )
    space = SubNetSpace.grid(depths=[1, 3], groups=[1, 2], ffn=[256, 512, 1024])
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 500_000}
    ids = torch.zeros(1, 16, dtype=torch.int64)
    ours = of_subnets(ranks, config, space, zero, ids)
    return {name: (ours[name], of_plain(ranks, config, space, name, zero, ids)) for name in NAMED}


def refused(ranks, run_path: Path, sources: list[Path], **patches) -> str:
    """What `load_model` says where each rank, on a host of its own, sees another directory."""
    alone = Ranks(ranks.rank, ranks.size, 0, ranks.device)
    run = load_run(run_path)
    run = run.model_copy(update={"model": run.model.model_copy(update={"init": "pretrained"})})
    with mock.patch.multiple(run_build, source_of=lambda run: sources[ranks.rank], **patches):
        try:
            run_build.load_model(run, plain_model(Case(3)).config, SPACE, alone)
        except UserError as error:
            return str(error)
    return ""


def on_each_rank(ranks, folder: Path) -> dict:
    checkpoints = {case: folder / str(case.tied) for case, _ in TRAINED}
    found: dict = {"saved": saved_by_a_first_engine(ranks)}
    for case, init in TRAINED:
        source = checkpoints[case] if init == "checkpoint" else None
        found[case] = [trained(ranks, case, source, whole_first) for whole_first in (True, False)]
    for depth in DEPTHS:
        for init in ("scratch", "checkpoint"):
            source = folder / f"depth{depth}" if init == "checkpoint" else None
            for precision in DTYPES:
                found[depth, init, precision] = live_bytes(ranks, depth, source, precision)
    found["owned"] = owned_layers(ranks)
    found["wide"] = wide_step_bytes(ranks)
    whole, run_path = folder / "False", folder / "run" / "tiny.toml"
    found["alike"] = refused(ranks, run_path, [whole] * 3)
    found["other"] = refused(ranks, run_path, [whole, whole, folder / "other"])
    found["missing"] = refused(ranks, run_path, [whole, folder / "missing", whole], fingerprint=lambda source: "")
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("partition")
    for tied in (False, True):
        plain_model(Case(3, tied=tied)).save_pretrained(folder / str(tied), max_shard_size="20KB")
        assert len(list((folder / str(tied)).glob("model-*.safetensors"))) > 3
    for depth in DEPTHS:
        LlamaForCausalLM(sized(depth)).save_pretrained(folder / f"depth{depth}", max_shard_size="100KB")
    damaged(folder)
    run_file(folder / "run", engine={"zero_optimization": {"stage": 3}})
    return on_ranks(NUM_RANKS, on_each_rank, folder, folder=folder / "ranks")


def at_stages(ranks, stages: list[int]) -> dict[int, tuple[dict, dict]]:
    return {stage: (step_bytes(ranks, stage), accumulated_bytes(ranks, stage)) for stage in stages}


def start(stages: list[int], folder: Path) -> dict[int, tuple[dict, dict]]:
    return on_ranks(NUM_RANKS, at_stages, stages, folder=folder)


@pytest.fixture(scope="module")
def bytes_at(tmp_path_factory) -> Callable[[int], tuple[dict, dict]]:
    """Returns a function from a stage to what `step_bytes` and `accumulated_bytes` return."""
    results = TIERS.started(start, tmp_path_factory)
    return lambda stage: results(stage)[stage]


def damaged(folder: Path) -> None:
    """One checkpoint without biases, and one with another weight."""
    model = plain_model(Case(3))
    config = copy.deepcopy(model.config)
    config.mlp_bias = False
    LlamaForCausalLM(config).save_pretrained(folder / "missing")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(folder / "other", max_shard_size="20KB")


@pytest.mark.parametrize("case", [case for case, _ in TRAINED], ids=lambda case: case.name)
def test_training_is_bit_equal_to_that_of_a_model_that_was_whole_first(found, case):
    whole_first, ours = found[case]
    for what in whole_first:
        assert list(ours[what]) == list(whole_first[what])
        assert all(torch.equal(ours[what][key], whole_first[what][key]) for key in ours[what]), what
    name = "model.embed_tokens.weight"
    assert not torch.equal(ours["before"][name].float(), ours["masters"][name])


def test_saved_tensors_hold_no_gathered_weight_and_plain_linears_are_deepspeeds(found):
    saved, kept, linear = found["saved"]
    assert saved > 60
    assert kept == 0
    assert linear.startswith("deepspeed."), "torch's own saves views of gathered weights"


def model_bytes(depth: int, precision: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in LlamaForCausalLM(sized(depth)).parameters()) * DTYPES[precision].itemsize


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("init", ["scratch", "checkpoint"])
def test_building_holds_this_ranks_part_and_one_whole_tensor(found, init, precision):
    embedding = VOCAB * 64 * 4 if precision == "fp32" else VOCAB * 64 * (4 + 2)  # fp32, and rounded from it
    for depth in DEPTHS:
        peak, now = found[depth, init, precision]
        part = model_bytes(depth, precision) / NUM_RANKS
        assert part <= now <= 1.01 * part, "padding and buffers"
        assert peak <= now + embedding


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("init", ["scratch", "checkpoint"])
def test_a_larger_model_costs_a_rank_its_part_of_the_difference(found, init, precision):
    (small, _), (large, _) = (found[depth, init, precision] for depth in DEPTHS)
    added = model_bytes(DEPTHS[1], precision) - model_bytes(DEPTHS[0], precision)
    assert large - small <= 1.01 * added / NUM_RANKS


def test_one_ranks_other_weights_are_one_error_on_all_ranks(found):
    assert found["alike"] == ""
    assert found["other"].startswith("rank 2 has the weights of pretrained = ")
    assert found["missing"].startswith("rank 1: ")
    assert "holds no tensor 'model.layers.0.mlp.gate_proj.bias'" in found["missing"]


@TIERS.each(STAGES, "stage")
def test_a_step_of_the_full_network_holds_no_more_than_plain_deepspeeds(bytes_at, stage):
    """Where the update's own peak lies depends on where a rank's part begins: it is compared with the same groups."""
    ours, plain = bytes_at(stage)[0]["full"]
    _, grouped = bytes_at(stage)[0]["grouped"]
    assert ours.passes <= 1.02 * plain.passes
    assert ours.most <= 1.02 * plain.most
    assert ours.update <= 1.02 * grouped.update


def test_the_smaller_group_of_the_optimizer_comes_first():
    """Stages 1 and 2 keep the gradients of both until the last one's turn."""
    model = nest(LlamaForCausalLM(sized(DEPTHS[0])), sized_space(DEPTHS[0]))
    groups = build_optimizer(model, Optim(), "torch").param_groups
    small, large = (sum(p.numel() for p in group["params"]) for group in groups)
    assert 0 < small < large


@pytest.mark.parametrize("name", NAMED)
def test_a_layer_half_at_once_holds_no_more_than_its_weights_one_by_one(found, name):
    """Where DeepSpeed may keep what is gathered, as it does by default. Otherwise a half more: docs/exactness.md."""
    ours, plain = found["wide"][name]
    assert ours.added <= 1.02 * plain.added


@TIERS.each(STAGES, "stage")
def test_the_passes_of_a_small_sub_network_add_what_its_extracted_model_would(bytes_at, stage):
    ours, plain = bytes_at(stage)[0]["smallest"]
    assert ours.added <= 1.02 * plain.added


@TIERS.each(STAGES, "stage")
def test_gradients_of_sub_networks_that_grow_take_no_more_than_the_full_networks(bytes_at, stage):
    """DeepSpeed would keep a buffer of a rank's part for each sub-network that is the first to use something."""
    steps = bytes_at(stage)[1]
    assert steps["growing"].passes <= steps["full"].passes


@TIERS.each([1, 2], "stage")
def test_a_small_sub_networks_gradients_take_no_buffer_of_a_ranks_part(bytes_at, stage):
    """DeepSpeed takes one for any. The update holds the gradients, zeros for what was not active, all in one piece."""
    ours, _ = bytes_at(stage)[0]["smallest"]
    part, largest = model_bytes(DEPTHS[0], "fp32") / NUM_RANKS, VOCAB * 64 * 4
    assert ours.update - ours.between <= 2 * (part + largest), (
        "a tensor may begin in one rank's part and end in another"
    )


@pytest.mark.parametrize("depth", [2, 4])
def test_the_first_layers_are_owned_by_all_ranks_about_alike(found, depth):
    """In their own order the first ranks alone would add up the gradients of a shallow sub-network, and offload."""
    assert sum(map(sum, found["owned"])) == pytest.approx(DEPTHS[1])
    assert max(sum(layers[:depth]) for layers in found["owned"]) <= depth / NUM_RANKS + 0.5


@TIERS.each(STAGES, "stage")
def test_the_whole_logits_never_exist_in_the_engine(bytes_at, stage):
    for ours, _ in bytes_at(stage)[0].values():
        rows = {shape.numel() // VOCAB for shape in ours.shapes if shape and shape[-1] == VOCAB and len(shape) > 1}
        assert rows == {CHUNK_ROWS, sized(1).hidden_size}, "chunks of logits, and the transposed head"
