"""With a draft a target writes what it writes alone: token by token in fp32, and in distribution when it draws."""

import math

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from sorted_ds import SubNetSpace, UserError, view
from sorted_ds.deploy.generation import speculative
from sorted_ds.deploy.generation.cached import Cached
from sorted_ds.deploy.generation.drafts import OwnDraft, SharedDraft, draft_of, new_layers
from sorted_ds.deploy.generation.speculative import LONGEST_DRAFT, DraftLength, Speculation
from tests.drafts import ENDS, agreeing_model, padded_prompts
from tests.families import SPACE, VARIANTS, tiny_config, tiny_model

FULL = "d4-g4-f112"
PAIRS = [
    (FULL, "d2-g4-f112", (0, 1, 2, 3), SharedDraft),
    (FULL, "d2-g1-f80", (2, 0, 3, 1), OwnDraft),
    ("d2-g3-f80", "d1-g3-f80", (0, 2, 3, 1), SharedDraft),
    (FULL, "d2-g4-f112", (2, 0, 3, 1), OwnDraft),
    (FULL, "d4-g1-f80", (0, 1, 2, 3), OwnDraft),
]
"""A target, a draft, the layer order, and how the draft works."""
CASES = [(variant, *case) for variant in VARIANTS for case in PAIRS[:2]] + [("llama", *case) for case in PAIRS[2:]]


def pair(model, target=FULL, draft="d2-g4-f112", order=None):
    return draft_of(model, target, draft, SubNetSpace(SPACE, layer_order=order))


def arguments(rows: int, longest: int = 13, **changes) -> dict:
    ids, mask = padded_prompts(rows, longest)
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": ENDS, "pad_token_id": 0}
    return {"inputs": ids, "attention_mask": mask, **settings, **changes}


def compare(draft, given: dict, draft_tokens: int | None = None) -> speculative.Counts:
    """Compares the tokens with those of the plain target, and returns what the speculation did."""
    given = dict(given)
    expected = draft.target.generate(**given)
    speculation = Speculation(draft, draft_tokens)
    assert torch.equal(speculation.generate(given.pop("inputs"), **given), expected)
    return speculation.counts


@pytest.mark.parametrize(("variant", "target", "small", "order", "kind"), CASES)
def test_the_tokens_are_those_of_the_target_alone(variant, target, small, order, kind):
    """Five rows have padding on the left, end at different times, and keep different numbers of tokens."""
    draft = pair(agreeing_model(variant), target, small, order)
    assert type(draft) is kind
    counts = compare(draft, arguments(rows=5))
    assert 0 < counts.accepted < counts.proposed


@pytest.mark.parametrize(("target", "small", "order", "kind"), PAIRS)
def test_a_single_row_is_never_padded_and_gives_the_same(target, small, order, kind):
    compare(pair(agreeing_model("qwen3, head norms"), target, small, order), arguments(rows=1), draft_tokens=3)


@pytest.mark.parametrize("small", ["d2-g4-f112", "d2-g1-f80"])
@pytest.mark.parametrize("variant", ["mistral, sliding", "gemma2", "qwen2, biases, sliding"])
def test_prompts_longer_than_the_window_keep_what_lies_before_it(variant, small):
    draft = pair(agreeing_model(variant), FULL, small)
    compare(draft, arguments(rows=3, longest=40, eos_token_id=None))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("draft_tokens", [1, 7])
def test_any_length_of_a_draft_and_any_attention_give_the_same(attention, draft_tokens):
    draft = pair(agreeing_model("llama, tied", attention))
    counts = compare(draft, arguments(rows=3), draft_tokens)
    assert counts.proposed <= counts.rounds * 3 * draft_tokens
    compare(draft, arguments(rows=3, max_new_tokens=1), draft_tokens)


@torch.no_grad()
@pytest.mark.parametrize("small", ["d2-g4-f112", "d2-g1-f80"])
def test_a_draft_has_seen_what_it_would_have_seen_alone(small, monkeypatch):
    """A draft that has forgotten the wrong tokens proposes worse ones, which the text does not show."""
    model, propose, differences = agreeing_model("mistral, sliding"), Speculation._propose, []
    draft, alone, last = pair(model, FULL, small), view(model, small), {}
    run = draft.propose
    monkeypatch.setattr(draft, "propose", lambda ids, seen: last.update(logits=run(ids, seen)) or last["logits"])

    def checked(self, rows, number, is_sampled):
        proposed, chances = propose(self, rows, number, is_sampled)
        for position, row in enumerate(rows.active if number else ()):
            known = rows.tokens[row, rows.padding[position] : rows.lengths[position]]
            logits = alone(torch.cat((known, proposed[position, :-1]))[None], logits_to_keep=1).logits
            differences.append((logits - last["logits"][position]).abs().max() / logits.abs().max())
        return proposed, chances

    monkeypatch.setattr(Speculation, "_propose", checked)
    counts = compare(draft, arguments(rows=3), draft_tokens=1)
    assert counts.accepted >= 3, "rows have seen different numbers of tokens"
    assert len(differences) > 20
    assert max(differences) < 1e-5  # fp32, with padding and without


def test_a_plain_model_can_draft_for_another_one():
    target, small = agreeing_model("qwen3, head norms"), tiny_model("llama", num_hidden_layers=1).eval()
    compare(OwnDraft(target, small), arguments(rows=3))


class AfterToken(StoppingCriteria):
    """Ends a row with a token that comes at an even length."""

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -1] > 60) & (input_ids.shape[1] % 2 == 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 12},
        {"suppress_tokens": list(range(0, 120, 2))},
        {"stopping_criteria": StoppingCriteriaList([AfterToken()])},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_processors_and_criteria_see_what_they_see_in_plain_generation(settings):
    draft = pair(agreeing_model("llama"))
    plain = draft.target.generate(**arguments(rows=4))
    given = arguments(rows=4, **settings)
    changed = draft.target.generate(**given)
    assert plain.shape != changed.shape or not torch.equal(plain, changed)
    compare(draft, given)


class Collector:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.parts: list[Tensor] = []
        self.has_ended = False

    def put(self, value: Tensor) -> None:
        self.parts.append(value.flatten())

    def end(self) -> None:
        self.has_ended = True


def test_a_streamer_gets_the_prompt_and_each_round_as_it_comes():
    draft, streamer = pair(agreeing_model("llama")), Collector()
    given = arguments(rows=1)
    ids = given.pop("inputs")
    found = Speculation(draft, 4).generate(ids, streamer=streamer, **given)
    assert torch.equal(torch.cat(streamer.parts), found[0])
    assert torch.equal(streamer.parts[0], ids[0])
    assert max(map(len, streamer.parts[1:])) > 1
    assert streamer.has_ended
    given = arguments(rows=2)
    with pytest.raises(UserError, match="2 rows cannot be streamed together"):
        Speculation(draft).generate(given.pop("inputs"), streamer=streamer, **given)


def test_verification_computes_no_layer_of_the_draft_again_and_nothing_is_copied():
    model = agreeing_model("llama")
    draft, columns = pair(model), {}
    for name, part in (("draft", draft.draft), ("tail", draft.tail), ("target", draft.target)):
        part.model.layers[0].register_forward_hook(
            lambda _, inputs, __, name=name: columns.setdefault(name, []).append(inputs[0].shape[1])
        )
    given = arguments(rows=1)
    found = Speculation(draft, 4).generate(given.pop("inputs"), **given)
    assert sum(columns["draft"]) == sum(columns["tail"])
    assert len(columns["tail"]) < found.shape[1] - 13
    assert "target" not in columns
    memory = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for part in (draft.draft, draft.tail):
        assert {parameter.untyped_storage().data_ptr() for parameter in part.parameters()} <= memory
        assert part.num_copied_bytes == 0


@torch.no_grad()
def test_rows_that_forget_different_numbers_of_tokens_go_on_as_if_they_had_never_seen_them():
    model = agreeing_model("mistral, sliding")
    ids = torch.randint(131, (3, 20), generator=torch.Generator().manual_seed(2))
    cached = Cached(model, 3, new_layers(model))
    cached.run(ids[:, :12], torch.tensor([12, 9, 5]), 1)  # the rows begin at columns 0, 3 and 7
    cached.forget(torch.tensor([4, 9, 3]))
    cached.select(torch.tensor([2, 0]))
    found = cached.run(ids[[2, 0], 12:], torch.tensor([11, 12]), 3)
    for row, kept in ((0, ids[2, 7:10]), (1, ids[0, :4])):
        alone = model(torch.cat((kept, ids[[2, 0][row], 12:]))[None]).logits[0, -3:]
        assert (found[row] - alone).abs().max() <= 1e-5 * alone.abs().max()  # fp32, with padding and without


# Drawing at random. The distribution of the first three tokens is computed, and 6,000 rows are drawn. A
# draft has up to two tokens, because the target always draws the last one.
VOCABULARY, NUM_DRAWN, PROMPT = 9, 6000, [3, 1, 4]
DRAWN = {"do_sample": True, "temperature": 0.7, "top_k": 6, "top_p": 0.95, "max_new_tokens": 4, "eos_token_id": None}


@pytest.fixture(scope="module")
def drawing():
    """A draft that is wrong often enough, and the chances of each three tokens of the target."""
    model = agreeing_model("llama", "sdpa", share=0.8, vocab_size=VOCABULARY)
    draft = pair(model)
    first = torch.cartesian_prod(*[torch.arange(VOCABULARY)] * 2)
    with torch.no_grad():
        logits = draft.target(torch.cat((torch.tensor(PROMPT).expand(len(first), -1), first), 1)).logits[:, -3:]
    chances = torch.stack([kept(row) for row in logits.flatten(0, 1)]).view(VOCABULARY, VOCABULARY, 3, VOCABULARY)
    return draft, chances[0, 0, 0][:, None, None] * chances[:, 0, 1][:, :, None] * chances[:, :, 2]


def kept(logits: Tensor) -> Tensor:
    """The chances of one position after temperature, top-k and top-p, computed here from their definitions."""
    order = logits.argsort(descending=True)[: DRAWN["top_k"]]
    chances = (logits[order] / DRAWN["temperature"]).softmax(0)
    is_kept = chances.cumsum(0) - chances < DRAWN["top_p"]
    return torch.zeros_like(logits).index_put((order,), chances * is_kept / (chances * is_kept).sum())


def distance(draft, expected: Tensor, draft_tokens: int) -> float:
    """How many standard deviations the chi-squared statistic of the drawn tokens lies above its mean."""
    torch.manual_seed(1)
    ids = torch.tensor(PROMPT).expand(NUM_DRAWN, -1)
    found = Speculation(draft, draft_tokens).generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **DRAWN)
    seen = torch.zeros_like(expected)
    seen.index_put_(tuple(found[:, 3:6].T), torch.ones(NUM_DRAWN), accumulate=True)
    if seen[expected == 0].any():  # tokens that the target cannot draw
        return math.inf
    is_frequent = expected * NUM_DRAWN >= 5
    wanted = torch.cat((expected[is_frequent], expected[~is_frequent].sum()[None])) * NUM_DRAWN
    counted = torch.cat((seen[is_frequent], seen[~is_frequent].sum()[None]))
    freedom = len(wanted) - 1
    return (((counted - wanted).square() / wanted).sum().item() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("draft_tokens", [1, 2])
def test_drawn_tokens_have_the_targets_distribution(drawing, draft_tokens):
    assert abs(distance(*drawing, draft_tokens)) < 4


def keep_all(proposed, chances, wanted):
    accepted = torch.full((len(proposed),), proposed.shape[1])
    return accepted, torch.multinomial(wanted[:, -1], 1)[:, 0]


def keep_and_draw_from_the_target(proposed, chances, wanted):
    """The right acceptance, but the next token is drawn without taking away what the draft had."""
    chances = torch.zeros_like(wanted[:, :0]) if chances is None else chances
    accepted, _ = RIGHT(proposed, chances, wanted) if proposed.shape[1] else (torch.zeros(len(proposed)).long(), 0)
    return accepted, torch.multinomial(wanted[torch.arange(len(proposed)), accepted], 1)[:, 0]


def keep_by_the_target_alone(proposed, chances, wanted):
    """A token is kept with the target's chance, as if the draft had proposed it with certainty."""
    return RIGHT(proposed, None if chances is None else torch.ones_like(chances), wanted)


RIGHT = speculative.keep_sampled


@pytest.mark.parametrize("wrong", [keep_all, keep_and_draw_from_the_target, keep_by_the_target_alone])
def test_a_wrong_rule_would_be_noticed(drawing, wrong, monkeypatch):
    monkeypatch.setattr(speculative, "keep_sampled", wrong)
    assert distance(*drawing, 2) > 8


def test_the_same_seed_draws_the_same_and_another_one_does_not():
    speculation = Speculation(pair(agreeing_model("llama")))
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        given = arguments(rows=2, do_sample=True)
        found.append(speculation.generate(given.pop("inputs"), **given))
    assert torch.equal(found[0], found[1])
    assert found[0].shape != found[2].shape or not torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lower_precision_writes_as_many_tokens(dtype):
    model = agreeing_model("llama", "sdpa").to(dtype)
    given = arguments(rows=3, eos_token_id=None)
    assert Speculation(pair(model)).generate(given.pop("inputs"), **given).shape == (3, 33)


def test_the_length_of_a_draft_follows_acceptance_and_its_cost():
    def after(accepted: int, cost: float) -> int:
        length = DraftLength(cost)
        for _ in range(30):
            chosen = length.choose()
            length.learn(torch.tensor([min(accepted, chosen)]), chosen)
        return length.choose()

    assert after(accepted=0, cost=0.1) == 1
    assert 1 < after(accepted=3, cost=0.1) < LONGEST_DRAFT
    assert after(accepted=99, cost=0.1) == LONGEST_DRAFT
    assert after(accepted=3, cost=0.02) > after(accepted=3, cost=0.5)
    assert DraftLength(0.1, fixed=5).choose() == 5


@pytest.mark.parametrize(
    ("target", "small", "message"),
    [
        ("d2-g4-f112", FULL, "it cannot be its draft. Name a draft that is smaller"),
        (FULL, FULL, "it cannot be its draft"),
        (FULL, "d3-g4-f112", r"d3-g4-f112 is not in the space\. Nearest that are: "),
        ("d9-g4-f112", "d1-g1-f32", r"d9-g4-f112 is not in the space"),
    ],
)
def test_a_pair_that_does_not_fit_is_one_line(target, small, message):
    with pytest.raises(UserError, match=message):
        pair(tiny_model("llama"), target, small)


def test_what_a_draft_cannot_do_is_one_line():
    draft = pair(agreeing_model("llama"))
    for settings, message in (
        ({"num_beams": 2}, "num_beams = 2 cannot be used with a draft"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate cannot be used with a draft"),
    ):
        given = arguments(rows=1, **settings)
        with pytest.raises(UserError, match=message):
            Speculation(draft).generate(given.pop("inputs"), **given)
    with pytest.raises(UserError, match="the number of draft tokens is 0"):
        Speculation(draft, 0)
    other = AutoModelForCausalLM.from_config(tiny_config("llama", vocab_size=50, num_hidden_layers=1))
    with pytest.raises(UserError, match="the draft has a vocabulary of 50 and the target one of 131"):
        OwnDraft(draft.target, other)
    with pytest.raises(UserError, match="it cannot be its draft"):
        OwnDraft(view(tiny_model("llama"), "d1-g1-f32"), draft.target)
