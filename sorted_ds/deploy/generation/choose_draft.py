"""Chooses the draft of a target by trying: the one with which it writes the given prompts fastest, or none.

In: a full network, its space, a target, prompts and options. Out: a `Choice` with the speed of all that was tried. A
few sub-networks and plain decoding write the beginning of the text, in turns. That takes as long as some hundred tokens
do, so it pays for long texts. Nothing is on disk.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sorted_ds.deploy.generation.drafts import can_share, draft_of
from sorted_ds.deploy.generation.generate import Completion, Options, generate
from sorted_ds.deploy.generation.speculative import Speculation
from sorted_ds.deploy.view import view
from sorted_ds.families import family_of
from sorted_ds.nested import Family
from sorted_ds.space import SubNet, SubNetSpace

AUTO = "auto"
"""The word that stands for a draft that is to be chosen."""
TRIED_TOKENS, ROUNDS = 24, 3
"""How many tokens a trial writes for each prompt, and how often."""
MOST_SHARED, MOST_OTHERS = 3, 2
"""The most drafts that are tried, of those that share the target's cache and of the others."""


@dataclass(frozen=True)
class Choice:
    """What was chosen, and what was tried."""

    model: PreTrainedModel | Speculation
    """The target with the fastest draft, or alone."""
    draft: str | None
    """The name of the draft; None for plain decoding."""
    speeds: dict[str, float]
    """Tokens a second with each draft that was tried, as a ratio to plain decoding in the same rounds."""


def choose_draft(
    model: PreTrainedModel,
    space: SubNetSpace,
    target: SubNet | str,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    options: Options,
    *,
    draft_tokens: int | None = None,
    chat: bool = False,
) -> Choice:
    """Returns the target with the draft that made it fastest, or alone if none did. `model` is the full network.

    Raises: UserError as `generate` does.
    """
    family = family_of(model.config.model_type)
    chosen = target if isinstance(target, SubNet) else space[target]
    drafts = {draft.name: draft_of(model, chosen, draft, space) for draft in candidates(space, family, chosen)}
    plain = view(model, chosen, space=space)
    short = replace(options, max_new_tokens=min(options.max_new_tokens, TRIED_TOKENS))

    def speed(written_by: PreTrainedModel | Speculation) -> float:
        return _tokens_per_second(lambda: generate(written_by, tokenizer, prompts, short, chat=chat))

    with torch.random.fork_rng():
        alone = speed(plain)
        for draft in drafts.values():
            draft.cost = alone / speed(draft.draft)
        tried = {name: Speculation(draft, draft_tokens) for name, draft in drafts.items()}
        rounds = [(speed(plain), {name: speed(made) for name, made in tried.items()}) for _ in range(ROUNDS)]
    speeds = {name: statistics.median(by_name[name] / alone for alone, by_name in rounds) for name in tried}
    best = max(speeds, key=speeds.__getitem__, default="")
    return Choice(tried[best], best, speeds) if speeds.get(best, 0) > 1 else Choice(plain, None, speeds)


def candidates(space: SubNetSpace, family: Family, target: SubNet) -> list[SubNet]:
    """Returns the drafts to try: a few parts of the target that share its cache, and a few others, spread evenly."""
    parts = [subnet for subnet in space if subnet != target and subnet.is_within(target)]
    shared = [subnet for subnet in parts if can_share(family, space, target, subnet)]
    others = [subnet for subnet in parts if subnet not in shared]
    return [*_spread(shared, MOST_SHARED), *_spread(others, MOST_OTHERS)]


def _spread(subnets: Sequence[SubNet], number: int) -> list[SubNet]:
    """Returns the first of this number of equal parts of the sub-networks."""
    return (
        [subnets[len(subnets) * part // number] for part in range(number)] if len(subnets) > number else list(subnets)
    )


def _tokens_per_second(write: Callable[[], list[Completion]]) -> float:
    began = time.perf_counter()
    num_tokens = sum(completion.num_tokens for completion in write())
    return num_tokens / (time.perf_counter() - began)
