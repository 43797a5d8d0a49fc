"""What `plan` says ranks exchange is what they exchange: every collective of a step counted, at every stage."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sorted_ds.engine import Engine
from sorted_ds.families import nest
from sorted_ds.nested import costs_of, union_parameters
from sorted_ds.run.config import Optim
from sorted_ds.run.traffic import StepSizes, step_traffic
from sorted_ds.space import Pass, SubNetSpace
from tests.batches import LLAMA, TASK, batch, blank
from tests.exactness import LARGE, MIDDLE, ROW_TOKENS, SMALL, SPACE, Case, plain_model
from tests.spawn import on_ranks
from tests.traffic import counted

STEPS = [(LARGE, SMALL, MIDDLE), (SMALL, SMALL), (MIDDLE, SMALL)]
MODES = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]
SMALL_CHANGE = 200
"""Bytes of norms and overflow flags that a step exchanges besides."""

DEEP = LlamaConfig(hidden_size=64, num_hidden_layers=8, intermediate_size=128, num_attention_heads=8, vocab_size=96)
DEEP_SPACE = SubNetSpace.grid(depths=[4, 8], groups=[4, 8], ffn=[64, 128])
HALF = 3 * 64 * 128 + 64
"""Parameters of a layer's larger half: its MLP with the norm before it."""
KEPT = [(distance, recomputed, 0) for distance in (80_000, 160_000, 320_000) for recomputed in (False, True)]
KEPT += [(distance, recomputed, 4 * HALF) for distance in (80_000, 160_000) for recomputed in (False, True)]
"""`stage3_max_reuse_distance`, activation checkpointing, and `stage3_prefetch_bucket_size`."""


def exchanged(ranks) -> dict:
    """The bytes of each step by kind, for each mode."""
    return {mode: of_mode(ranks, *mode) for mode in MODES}


def of_mode(ranks, stage: int, precision: str) -> list[dict[str, int]]:
    config = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    config |= {"bf16": {"enabled": True}} if precision == "bf16" else {}
    model = nest(plain_model(Case(stage)), SPACE).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    engine = Engine(model, TASK, config, "test.json", Optim(), 2, ranks)
    engine.warm_up(blank(2, ROW_TOKENS))
    ids = torch.zeros(2, ROW_TOKENS, dtype=torch.int64)
    found = []
    for sampled in STEPS:
        with counted() as traffic:
            for subnet in sampled:
                engine.backward(engine.forward(batch(ids, ids), Pass(subnet)).loss)
            engine.step(0.0)
        found.append(traffic.bytes)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return on_ranks(2, exchanged, folder=tmp_path_factory.mktemp("exchanged"))


@pytest.mark.parametrize(("stage", "precision"), MODES)
def test_the_formula_is_what_is_counted(found, stage, precision):
    config = plain_model(Case(stage)).config
    costs = costs_of(SPACE, LLAMA, config, ROW_TOKENS)
    for sampled, counted_bytes in zip(STEPS, found[stage, precision], strict=True):
        union = union_parameters([sampled], LLAMA, config)[0]
        sizes = StepSizes([costs[s].parameters for s in sampled], union, forwards=1)
        told = step_traffic(stage, precision == "bf16", costs[SPACE.full].parameters, sizes)
        assert counted_bytes["gather"] == pytest.approx(told.gathered, rel=1e-3)
        assert told.reduced <= counted_bytes["reduce"] <= told.reduced + SMALL_CHANGE
        assert counted_bytes["scatter"] == pytest.approx(told.scattered, rel=1e-3)
        assert counted_bytes["broadcast"] == 0


def gathered_again(ranks) -> dict[tuple[int, bool, int], dict[str, int]]:
    """Bytes that a micro-batch of each sub-network gathers, where little is kept until its backward pass."""
    ids, found = torch.zeros(2, ROW_TOKENS, dtype=torch.int64), {}
    for distance, recomputed, prefetch in KEPT:
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": prefetch}
        model = LlamaForCausalLM(DEEP)
        if recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        config = {"zero_optimization": {**zero, "stage3_max_reuse_distance": distance}}
        engine = Engine(nest(model, DEEP_SPACE), TASK, config, "test.json", Optim(), 2, ranks)
        engine.warm_up(blank(2, ROW_TOKENS))
        counts = found[distance, recomputed, prefetch] = {}
        for subnet in engine.model.space:
            with counted() as traffic:
                engine.backward(engine.forward(batch(ids, ids), Pass(subnet)).loss)
            counts[subnet.name] = traffic.bytes["gather"]
    return found


@pytest.mark.long
@pytest.mark.ci
def test_what_is_not_kept_for_the_backward_pass_is_gathered_again(tmp_path):
    """A layer half is kept as a whole or not, so the formula is at most one above. What is fetched ahead stays too."""
    costs = costs_of(DEEP_SPACE, LLAMA, DEEP, ROW_TOKENS)
    ratios = []
    for (distance, recomputed, prefetch), counts in on_ranks(2, gathered_again, folder=tmp_path).items():
        for subnet, cost in costs.items():
            sizes = StepSizes([cost.parameters], cost.parameters, forwards=1)
            told = step_traffic(3, False, costs[DEEP_SPACE.full].parameters, sizes, distance, recomputed).gathered
            assert 4 * cost.parameters <= counts[subnet.name] <= told
            assert prefetch or told - 4 * HALF <= counts[subnet.name]
            ratios.append(told / cost.parameters / 4)
    assert min(ratios) == 1.0
    assert max(ratios) > 1.7
