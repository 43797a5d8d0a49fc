"""Isolated documents of a row: the logits of a document are the same bits whatever its neighbours are."""

import pytest
import torch
from torch import Tensor

from sorted_ds.base.errors import UserError
from sorted_ds.data.rows import positions_of
from sorted_ds.families import family_of, nest
from sorted_ds.run.run_file import load_run
from sorted_ds.space import Pass
from sorted_ds.tasks import SummedLoss
from sorted_ds.tasks.causal_lm import ISOLATING
from tests.batches import TASK
from tests.families import SPACE, SUBNETS, VARIANTS, tiny_config, tiny_model, tokens
from tests.runs import run_file

LENGTHS = (5, 9, 6)
"""Three documents of a row; the second one is watched."""
WATCHED = slice(5, 14)


def test_every_family_that_may_isolate_is_tested():
    assert {variant.split(",")[0] for variant in VARIANTS} == {*ISOLATING}


@pytest.mark.parametrize(
    ("family", "attention", "said"),
    [
        ("gpt2", "", "in gpt2. Remove"),
        ("llama", "flash_attention_2", "in llama with flash_attention_2 attention. Remove"),
    ],
)
def test_what_was_not_shown_to_isolate_is_refused(family, attention, said, tmp_path):
    run = load_run(run_file(tmp_path), ["batch.isolate=true"])
    run = run.model_copy(update={"model": run.model.model_copy(update={"attention": attention})})
    config = tiny_config("llama")
    config.model_type = family
    with pytest.raises(UserError, match=r"^batch\.isolate = true was not shown to isolate documents ") as raised:
        TASK.check_config(run, config)
    assert said in str(raised.value)


def positions() -> Tensor:
    begins = torch.zeros(sum(LENGTHS), dtype=torch.bool)
    begins[[0, 5, 14]] = True
    return torch.from_numpy(positions_of(begins.numpy())).repeat(2, 1)


def with_neighbours(seed: int) -> Tensor:
    """Two rows, whose watched documents do not depend on the seed."""
    rows = tokens(2, sum(LENGTHS), seed=seed)
    rows[:, WATCHED] = tokens(2, LENGTHS[1], seed=99)
    return rows


def attentions(variant: str) -> list[str]:
    return ["eager"] if variant == "gemma2" else ["eager", "sdpa"]


CASES = [(variant, attention) for variant in VARIANTS for attention in attentions(variant)]


@pytest.mark.parametrize(("variant", "attention"), CASES, ids=[f"{v}, {a}" for v, a in CASES])
def test_a_documents_logits_do_not_depend_on_its_neighbours_in_any_training_pass(variant, attention):
    plain = tiny_model(variant, attention)
    family = family_of(plain.config.model_type)
    model = SummedLoss(nest(tiny_model(variant, attention), SPACE), TASK, family).train().model
    for name in SUBNETS[:4]:
        model.set_pass(Pass(SPACE[name], "train"))

        def logits(seed: int, isolate: bool = True, model=model) -> Tensor:
            batch = {"input_ids": with_neighbours(seed), **({"position_ids": positions()} if isolate else {})}
            return model.get_submodule(family.head)(TASK.states(model, family, batch))[:, WATCHED]

        assert torch.equal(logits(1), logits(2)), name
        assert not torch.equal(logits(1, isolate=False), logits(2, isolate=False)), "neighbours are seen otherwise"
    model.set_pass(Pass(SPACE.full, "train"))
    alone = plain(input_ids=tokens(2, LENGTHS[1], seed=99), use_cache=False).logits
    own = plain(input_ids=with_neighbours(1), position_ids=positions(), use_cache=False).logits[:, WATCHED]
    # fp32 logits of the order of 1; the sums over keys run over other lengths.
    assert torch.allclose(own, alone, atol=1e-5)
