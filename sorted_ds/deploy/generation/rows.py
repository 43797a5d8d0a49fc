"""`Rows`: the rows of a batch that are being generated, which have different numbers of tokens.

In: a padded batch of prompts, and transformers' processors and criteria. Out: the token ids, as `generate` returns
them. A row's new tokens follow its prompt, so up to the row's length each row is what it is in plain generation, where
all rows have the same length. Processors and criteria see all rows at one length, as they do there.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process

SCORES_ALONE = tuple(
    getattr(logits_process, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "SuppressTokensLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
    )
)
"""Processors that do not look at the tokens before, so one call can process the scores of all positions."""


class Rows:
    """The tokens of a batch, and which rows are not finished.

    Shapes: N rows, A of them not finished, P columns of the padded prompts, L columns at most, Q positions, V tokens of
    the vocabulary. `lengths`, `padding` and `active` are on the CPU.
    """

    def __init__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        config: GenerationConfig,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
    ):
        """Shapes: input_ids, attention_mask [N, P]."""
        num_rows, width = input_ids.shape
        pad = getattr(config, "_pad_token_tensor", None)
        self.tokens = input_ids.new_full((num_rows, config.max_length), 0 if pad is None else int(pad))
        self.tokens[:, :width] = input_ids
        self.pad = self.tokens[0, -1].clone()
        self.lengths = torch.full((num_rows,), width)
        """The columns of each unfinished row that hold its padding, prompt and new tokens. [A]"""
        self.padding = torch.zeros_like(self.lengths) if attention_mask is None else width - attention_mask.sum(1).cpu()
        self.active = torch.arange(num_rows)
        """The numbers of the rows that are not finished. [A]"""
        self.ends = self.lengths.clone()
        """The columns that each row has in the end. [N]"""
        self.processors: Any = processors
        self.criteria: Any = criteria

    @property
    def num_tokens(self) -> Tensor:
        """The number of tokens of each unfinished row, without padding. [A]"""
        return self.lengths - self.padding

    @property
    def num_left(self) -> int:
        """The number of tokens that every unfinished row can still get."""
        return self.tokens.shape[1] - int(self.lengths.max())

    def last(self, number: int, beyond: int = 0) -> Tensor:
        """Returns the last tokens of each unfinished row, and `beyond` proposed ones. [A, number + beyond]"""
        return self._columns(torch.arange(-number, beyond))

    def propose(self, token: Tensor, offset: int) -> None:
        """Writes a token of each unfinished row `offset` columns behind its length. [A]"""
        device = self.tokens.device
        self.tokens[self.active.to(device), (self.lengths + offset).to(device)] = token.to(device)

    def extend(self, new: Tensor, counts: Tensor) -> Tensor:
        """Adds the first `counts` of the new tokens to each unfinished row, and takes out the rows that end with them.

        Returns which of the rows go on, by their numbers among the unfinished ones.

        Shapes: new [A, Q], counts [A], at least 1 and at most Q.
        """
        for offset in range(new.shape[1]):
            self.propose(new[:, offset], offset)
        ends = self._first_stop(counts)
        self.lengths = torch.where(ends > 0, ends, self.lengths + counts)
        self.ends[self.active] = self.lengths
        going_on = (ends == 0).nonzero()[:, 0]
        self.lengths, self.padding, self.active = (x[going_on] for x in (self.lengths, self.padding, self.active))
        return going_on

    def processed(self, logits: Tensor, first: int = 0) -> Tensor:
        """Returns the scores that the processors make of logits, in fp32. Shapes: [A, Q, V] -> [A, Q, V].

        Position q is about the token that comes after the row's tokens and its first `first + q` proposed ones.
        """
        scores = logits.to(self.tokens.device, torch.float32, copy=True)
        if all(isinstance(processor, SCORES_ALONE) for processor in self.processors):
            return self.processors(self.tokens, scores.flatten(0, 1)).view_as(scores)
        for length, rows, offsets in self._by_length(scores.shape[1], first):
            every_row = scores.new_zeros(len(self.tokens), scores.shape[2])
            every_row[self.active[rows]] = scores[rows, offsets]
            scores[rows, offsets] = self.processors(self.tokens[:, :length], every_row)[self.active[rows]]
        return scores

    def finished(self) -> Tensor:
        """Returns the rows with padding on the right, as wide as the longest one."""
        columns = torch.arange(self.tokens.shape[1])
        is_padding = (columns >= self.ends[:, None]).to(self.tokens.device)
        return self.tokens.masked_fill(is_padding, self.pad)[:, : int(self.ends.max())]

    def _first_stop(self, counts: Tensor) -> Tensor:
        """Returns the smallest length with new tokens at which a row is finished, or 0. [A]"""
        ends = torch.zeros_like(self.lengths)
        for before, rows, offsets in self._by_length(int(counts.max())):
            stops = self.criteria(self.tokens[:, : before + 1], None).cpu()[self.active[rows]]
            stops &= (offsets < counts[rows]) & (ends[rows] == 0)
            ends[rows[stops]] = before + 1
        return ends

    def _by_length(self, num_positions: int, first: int = 0) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields each number of columns that comes before a position, ascending, with these rows and positions."""
        lengths = self.lengths[:, None] + first + torch.arange(num_positions)
        for length in lengths.unique().tolist():
            rows, offsets = (lengths == length).nonzero(as_tuple=True)
            yield length, rows, offsets

    def _columns(self, offsets: Tensor) -> Tensor:
        device = self.tokens.device
        return self.tokens[self.active.to(device)].gather(1, (self.lengths[:, None] + offsets).to(device))
