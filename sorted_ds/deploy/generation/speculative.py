"""`Speculation`: generates with a large sub-network, the target, while a smaller one, the draft, proposes tokens.

In: token ids, and the arguments of transformers' `generate`. Out: token ids, those that the target would have generated
without a draft. In a round the draft proposes some tokens, one after the other, and the target then computes all of
them in one pass and keeps the first ones that it agrees with. Without sampling that is the tokens that it would have
chosen. With sampling a token is kept with such a probability that the text has the target's distribution.

Source: Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from sorted_ds.base.errors import UserError
from sorted_ds.deploy.generation.drafts import Draft
from sorted_ds.deploy.generation.rows import Rows

LONGEST_DRAFT = 16
"""The most tokens of a draft whose length follows acceptance."""
FIRST_GUESS, GUESSED_TOKENS = 0.7, 4.0
"""The acceptance that is assumed at first, and on how many tokens it counts as measured."""
MEMORY = 0.9
"""The weight of earlier rounds in the measured acceptance, for each later round."""


@dataclass
class Counts:
    """What a generation did, over all rows."""

    rounds: int = 0
    """The number of passes of the target."""
    proposed: int = 0
    """The tokens that the draft proposed."""
    accepted: int = 0
    """The proposed tokens that the target kept."""

    def add(self, accepted: Tensor, num_proposed: int) -> None:
        """Counts a round. `accepted`: the kept tokens of each row. [B]"""
        self.rounds += 1
        self.proposed += num_proposed * len(accepted)
        self.accepted += int(accepted.sum())

    @property
    def acceptance(self) -> float:
        """The share of the proposed tokens that were kept."""
        return self.accepted / self.proposed if self.proposed else 0.0


class DraftLength:
    """Chooses how many tokens to propose: a fixed number, or the one that fits the acceptance of the last rounds."""

    def __init__(self, cost: float, fixed: int | None = None):
        """`cost`: of a step of the draft, as a share of a step of the target."""
        self.cost, self.fixed = cost, fixed
        self.kept, self.tried = FIRST_GUESS * GUESSED_TOKENS, GUESSED_TOKENS

    def choose(self) -> int:
        """Returns the length with the most tokens for a cost, if each proposed token is kept independently."""
        rate = min(self.kept / self.tried, 0.99)

        def tokens_for_cost(length: int) -> float:
            return (1 - rate ** (length + 1)) / (1 - rate) / (1 + self.cost * length)

        return self.fixed or max(range(1, LONGEST_DRAFT + 1), key=tokens_for_cost)

    def learn(self, accepted: Tensor, length: int) -> None:
        """Takes in a round. A row's tokens after the first one that was not kept say nothing. Shapes: accepted [B]."""
        self.kept = MEMORY * self.kept + float(accepted.sum())
        self.tried = MEMORY * self.tried + float((accepted + 1).clamp(max=length).sum())


class Speculation:
    """A target that generates with a draft. One thread at a time can use it.

    `counts` tells what the last generation did.
    """

    def __init__(self, draft: Draft, draft_tokens: int | None = None):
        """`draft_tokens`: how many tokens a draft has; None for a number that follows acceptance.

        Raises: UserError for a number below 1.
        """
        if draft_tokens is not None and draft_tokens < 1:
            raise UserError(f"the number of draft tokens is {draft_tokens}. Name at least 1.")
        self.draft, self.draft_tokens = draft, draft_tokens
        self.counts = Counts()

    def generate(self, input_ids: Tensor, *, streamer: BaseStreamer | None = None, **kwargs: Any) -> Tensor:
        """Returns what `target.generate` with these arguments returns.

        Without sampling it is the same text in fp32; in lower precision, passes of one and of several tokens may round
        to different choices. With sampling the text has the same distribution. `streamer` takes a batch of one.

        Raises: UserError for beams, or for outputs other than token ids.
        """
        if streamer is not None:
            if len(input_ids) > 1:
                raise UserError(f"{len(input_ids)} rows cannot be streamed together. Stream one at a time.")
            streamer.put(input_ids.cpu())
        decode = partial(self._decode, streamer=streamer)
        generate: Any = self.draft.target.generate
        found = generate(input_ids, custom_generate=decode, **kwargs)
        if streamer is not None:
            streamer.end()
        return found

    def _decode(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None,
        **model_kwargs: Any,
    ) -> Tensor:
        """The loop over rounds, which transformers' `generate` calls once it has prepared everything."""
        _check_config(generation_config)
        mask = model_kwargs.get("attention_mask")
        rows = Rows(input_ids, mask, generation_config, logits_processor, stopping_criteria)
        is_sampled = bool(generation_config.do_sample)
        length, self.counts = DraftLength(self.draft.cost, self.draft_tokens), Counts()
        self.draft.begin(len(input_ids))
        num_proposed = 0  # in the first round the target reads the prompt
        while len(rows.active):
            proposed, chances = self._propose(rows, num_proposed, is_sampled)
            accepted, new = self._verify(rows, proposed, chances, is_sampled)
            self.counts.add(accepted, num_proposed)
            if num_proposed:
                length.learn(accepted, num_proposed)
            end = int(rows.ends[0])
            going_on = rows.extend(new, accepted + 1)
            if streamer is not None:
                streamer.put(new[0, : int(rows.ends[0]) - end].cpu())
            self.draft.select(going_on)
            if len(going_on):
                self.draft.forget(rows.num_tokens)
                num_proposed = min(length.choose(), rows.num_left - 1)
        return rows.finished()

    def _propose(self, rows: Rows, number: int, is_sampled: bool) -> tuple[Tensor, Tensor | None]:
        """Lets the draft propose tokens for each row, and writes them behind the rows.

        Returns them, and with sampling the probabilities that they were drawn with.

        Shapes: [A, number], [A, number, V].
        """
        tokens, chances = [], []
        for offset in range(number):
            logits = self.draft.propose(*self._missing(rows, self.draft.seen, offset))
            scores = rows.processed(logits, first=offset)[:, 0]
            if is_sampled:
                chances.append(scores.softmax(-1))
            tokens.append(_draw(chances[-1]) if is_sampled else scores.argmax(-1))
            rows.propose(tokens[-1], offset)
        proposed = torch.stack(tokens, 1) if tokens else rows.tokens.new_zeros(len(rows.active), 0)
        return proposed, torch.stack(chances, 1) if is_sampled and chances else None

    def _verify(self, rows: Rows, proposed: Tensor, chances: Tensor | None, is_sampled: bool) -> tuple[Tensor, Tensor]:
        """Lets the target read the proposed tokens. Returns how many of them each row keeps, and the new tokens.

        The token that follows those that were kept is the target's own, so each row gets one more.

        Shapes: proposed [A, K], chances [A, K, V] -> [A] on the CPU, [A, K + 1].
        """
        number = proposed.shape[1]
        logits = self.draft.verify(*self._missing(rows, self.draft.verified, number), number + 1)
        scores = rows.processed(logits)
        if is_sampled:
            accepted, following = keep_sampled(proposed, chances, scores.softmax(-1))
        else:
            accepted, following = keep_chosen(proposed, scores)
        new = torch.cat((proposed, following[:, None]), 1).scatter(1, accepted[:, None], following[:, None])
        return accepted.cpu(), new

    def _missing(self, rows: Rows, seen: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Returns the tokens up to the first `number` proposed ones that were not seen, and what is seen after them.

        Shapes: seen [A] -> [A, Q], [A].
        """
        seen_after = rows.num_tokens + number
        missing = int((seen_after - seen).max())
        return rows.last(missing - number, beyond=number).to(self.draft.target.device), seen_after


def keep_chosen(proposed: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Returns how many proposed tokens of each row are the target's own choices, and its choice that follows them.

    Shapes: proposed [B, K], the target's scores [B, K + 1, V] -> [B], [B].
    """
    choices = scores.argmax(-1)
    accepted = (proposed == choices[:, :-1]).long().cumprod(1).sum(1)
    return accepted, choices.gather(1, accepted[:, None])[:, 0]


def keep_sampled(proposed: Tensor, chances: Tensor | None, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Returns how many proposed tokens each row keeps, and the token that follows them.

    A token that the draft drew with probability q and the target would draw with p is kept with probability
    min(1, p / q). In place of the first one that is not kept, the target draws from what p has more than q. If all are
    kept, it draws the next one. So the tokens have the distribution of the target.

    Shapes: proposed [B, K], probabilities of the draft [B, K, V] (None if K is 0) and of the target [B, K + 1, V] ->
    [B], [B].
    """
    if chances is None:
        return proposed.new_zeros(len(proposed)), _draw(wanted[:, 0])
    p = wanted[:, :-1].gather(2, proposed[..., None])[..., 0]
    q = chances.gather(2, proposed[..., None])[..., 0]
    accepted = (torch.rand_like(q) * q < p).long().cumprod(1).sum(1)
    rest = torch.cat(((wanted[:, :-1] - chances).clamp(min=0), wanted[:, -1:]), 1)
    rest, wanted_there = (_at(x, accepted) for x in (rest, wanted))
    is_some_left = rest.sum(-1, keepdim=True) > 0  # none where p and q are equal but for rounding
    return accepted, _draw(torch.where(is_some_left, rest, wanted_there))


def _at(values: Tensor, positions: Tensor) -> Tensor:
    """Shapes: values [B, K, V], positions [B] -> [B, V]."""
    return values[torch.arange(len(values), device=values.device), positions]


def _draw(chances: Tensor) -> Tensor:
    """Draws a token for each row. The probabilities need not add up to 1. Shapes: [B, V] -> [B]."""
    return torch.multinomial(chances, 1)[:, 0]


def _check_config(config: GenerationConfig) -> None:
    """Raises: UserError for what a draft cannot do."""
    if (config.num_beams or 1) > 1:
        raise UserError(
            f"num_beams = {config.num_beams} cannot be used with a draft. Leave out the draft or the beams."
        )
    if config.return_dict_in_generate:
        raise UserError(
            "return_dict_in_generate cannot be used with a draft, which gives token ids alone. Leave it out."
        )
