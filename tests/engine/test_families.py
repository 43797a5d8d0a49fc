"""Every family under ZeRO on two ranks: biases, norms across heads, norms after a half, capped and divided logits.

The exactness tests have one llama; here each family takes one step of SGD on three sub-networks, and its weights are
compared with those of the masked full model in one process.
"""

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


def rows_of(rank: int, share: int) -> torch.Tensor:
    return tokens(ROWS, ROW_TOKENS, seed=10 * share + rank)


def trained(ranks, stage: int) -> dict[str, dict]:
    """For each variant: the master weights after a step, under Hugging Face's names."""
    found = {}
    config = {"zero_optimization": {"stage": stage, **SMALL_ZERO, "stage3_prefetch_bucket_size": 5_000}}
    optim = Optim(name="sgd", clip_norm=0.0, weight_decay=0.0)
    for variant in VARIANTS:
        model = tiny_model(variant)
        if variant in CHECKPOINTED:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        engine = Engine(nest(model, SPACE), TASK, config, "test.json", optim, ROWS, ranks)
        engine.warm_up(blank(ROWS, ROW_TOKENS))
        for share, name in enumerate(SUBNETS):
            ids = rows_of(ranks.rank, share)
            labels = F.pad(ids[:, 1:], (0, 1), value=-100)
            engine.backward(engine.forward(batch(ids, labels), Pass(SPACE[name])) / NUM_TARGETS)
        engine.step(RATE)
        found[variant] = hf_tensors(engine.model, SPACE.full, gather_masters(engine, ranks).__getitem__)
    return found


@pytest.fixture(scope="module")
def by_stage(tmp_path_factory) -> dict[int, dict]:
    return {stage: on_ranks(NUM_RANKS, trained, stage, folder=tmp_path_factory.mktemp(f"{stage}")) for stage in (2, 3)}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_of_every_family_is_that_of_the_masked_full_model(by_stage, stage, variant):
    full = tiny_model(variant)
    before = {name: parameter.detach().double() for name, parameter in full.named_parameters()}
    expected = {name: value.clone() for name, value in before.items()}
    for rank in range(NUM_RANKS):
        for share, name in enumerate(SUBNETS):
            for key, grad in run_reference(full, SPACE[name], rows_of(rank, share)).grads.items():
                expected[key] -= RATE * grad / NUM_TARGETS
    weights = by_stage[stage][variant]
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        moved = (value - before[name]).abs().max()
        assert moved > 0, name
        # Sums in fp32 in another order: 1e-5 of the largest change, and the rounding of the weight itself.
        assert (weights[name] - value).abs().max() <= 1e-5 * moved + 1.2e-7 * value.abs().max(), name
