"""Every family under ZeRO on two ranks: biases, norms across heads, norms after a half, capped and divided logits.

The exactness tests train one llama. Here each family takes one step of SGD with three sub-networks, and its weights are
compared with those of the masked full model in one process. The first tier trains the families of `CORE`, which have
biases, norms across heads and after a half, and capped and divided logits; the second tier trains the others.
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch.nn import functional as F

from sorted_ds.engine import Engine
from sorted_ds.families import nest
from sorted_ds.nested.weights import hf_tensors
from sorted_ds.run.config import Optim
from sorted_ds.space import Pass
from tests.batches import TASK, batch, blank
from tests.exactness import SMALL_ZERO, gather_masters
from tests.families import SPACE, VARIANTS, tiny_model, tokens
from tests.parity import run_reference
from tests.spawn import on_ranks

SUBNETS = ("d4-g4-f112", "d2-g3-f80", "d1-g1-f32")
NUM_RANKS, ROWS, ROW_TOKENS = 2, 2, 12
NUM_TARGETS = NUM_RANKS * len(SUBNETS) * ROWS * (ROW_TOKENS - 1)
RATE = 0.5
CHECKPOINTED = ("gemma2", "olmo2", "qwen2, biases, sliding")
STAGES = (2, 3)
CORE = ("gemma2", "olmo2", "granite")
REST = tuple(variant for variant in VARIANTS if variant not in CORE)


def rows_of(rank: int, share: int) -> torch.Tensor:
    return tokens(ROWS, ROW_TOKENS, seed=10 * share + rank)


def trained(ranks, variants: tuple[str, ...]) -> dict[tuple[int, str], dict]:
    """Returns the master weights after a step, under Hugging Face's names, by stage and variant."""
    return {(stage, variant): train(ranks, stage, variant) for stage in STAGES for variant in variants}


def train(ranks, stage: int, variant: str) -> dict[str, torch.Tensor]:
    config = {"zero_optimization": {"stage": stage, **SMALL_ZERO, "stage3_prefetch_bucket_size": 5_000}}
    optim = Optim(name="sgd", clip_norm=0.0, weight_decay=0.0)
    model = tiny_model(variant)
    if variant in CHECKPOINTED:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    engine = Engine(nest(model, SPACE), TASK, config, "test.json", optim, ROWS, ranks)
    engine.warm_up(blank(ROWS, ROW_TOKENS))
    for share, name in enumerate(SUBNETS):
        ids = rows_of(ranks.rank, share)
        labels = F.pad(ids[:, 1:], (0, 1), value=-100)
        engine.backward(engine.forward(batch(ids, labels), Pass(SPACE[name])).loss / NUM_TARGETS)
    engine.step(RATE)
    return hf_tensors(engine.model, SPACE.full, gather_masters(engine, ranks).__getitem__)


@pytest.fixture(scope="module")
def weights_of(tmp_path_factory) -> Callable[[int, str], dict]:
    """Returns a function of stage and variant. The ranks start once for the variants of a tier, when one is needed."""

    @cache
    def weights(variants: tuple[str, ...]) -> dict[tuple[int, str], dict]:
        return on_ranks(NUM_RANKS, trained, variants, folder=tmp_path_factory.mktemp("families"))

    return lambda stage, variant: weights(CORE if variant in CORE else REST)[stage, variant]


def in_tiers(variants: tuple[str, ...]) -> list:
    return [variant if variant in CORE else pytest.param(variant, marks=pytest.mark.long) for variant in variants]


@pytest.mark.parametrize("variant", in_tiers((*CORE, *REST)))
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_of_every_family_is_that_of_the_masked_full_model(weights_of, stage, variant):
    full = tiny_model(variant)
    before = {name: parameter.detach().double() for name, parameter in full.named_parameters()}
    expected = {name: value.clone() for name, value in before.items()}
    for rank in range(NUM_RANKS):
        for share, name in enumerate(SUBNETS):
            for key, grad in run_reference(full, SPACE[name], rows_of(rank, share)).grads.items():
                expected[key] -= RATE * grad / NUM_TARGETS
    weights = weights_of(stage, variant)
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        moved = (value - before[name]).abs().max()
        assert moved > 0, name
        # Sums in fp32 in another order: 1e-5 of the largest change, and the rounding of the weight itself.
        assert (weights[name] - value).abs().max() <= 1e-5 * moved + 1.2e-7 * value.abs().max(), name
