"""Generates text with a sub-network, alone or with a smaller one as its draft.

In: a plain Hugging Face model or a `Speculation` (speculative.py), its tokenizer, and prompts. Out: a `Completion` for
each prompt. The prompts are one batch, with padding on the left, and transformers' `generate` does the rest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from sorted_ds.base.errors import UserError
from sorted_ds.deploy.generation.speculative import Speculation


@dataclass(frozen=True)
class Options:
    """How text is generated."""

    max_new_tokens: int = 128
    """The most tokens that are generated for a prompt. At least 1."""
    temperature: float = 0.0
    """0 always takes the likeliest token. A number above 0 divides the logits, and tokens are drawn at random."""
    top_p: float | None = None
    """Draw from the likeliest tokens that have this probability together. Above 0, at most 1."""
    top_k: int | None = None
    """Draw from this number of the likeliest tokens. At least 1."""

    def __post_init__(self):
        """Raises: UserError for a number out of its range."""
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens = {self.max_new_tokens} is below 1. Ask for at least one token.")
        if not 0 <= self.temperature < math.inf:
            raise UserError(
                f"temperature = {self.temperature} is not a number from 0 on. Write 0 for the likeliest tokens, or a "
                "number like 0.8 to draw them."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p} is not above 0 and at most 1. Write a number like 0.9.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k = {self.top_k} is below 1. Write a number like 50.")
        if not self.temperature and (self.top_p or self.top_k):
            raise UserError("top_p and top_k choose among tokens that are drawn. Set a temperature above 0, too.")

    def for_transformers(self) -> dict[str, Any]:
        """Returns the arguments of transformers' `generate`. They replace what a generation config says of sampling."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p or 1.0, "top_k": self.top_k or 0}
        defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}  # others would be warned of, without sampling
        is_drawn = self.temperature > 0
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": is_drawn,
            "num_beams": 1,
            **(drawn if is_drawn else defaults),
        }


@dataclass(frozen=True)
class Completion:
    """What was generated for a prompt."""

    prompt: str
    text: str
    """The new text, without special tokens."""
    num_prompt_tokens: int
    num_tokens: int
    """The number of new tokens, with the one that ends the text."""


def generate(
    model: PreTrainedModel | Speculation,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    options: Options,
    *,
    chat: bool = False,
    streamer: BaseStreamer | None = None,
) -> list[Completion]:
    """Returns a completion for each prompt. `chat` takes a prompt as a user's message, in the tokenizer's template.

    `streamer` gets the tokens of a single prompt as soon as they are there.

    Raises: UserError for an empty prompt, one that is too long for the model, or a chat template that is missing.
    """
    target = model.draft.target if isinstance(model, Speculation) else model
    rows = encode(tokenizer, prompts, chat)
    check_context([len(row) for row in rows], options, target)
    ends = ends_of(target)
    padding = tokenizer.pad_token_id
    if padding is None:
        padding = ends[0] if ends else 0
    ids, mask = padded(rows, padding, target.device)
    run: Any = model.generate
    found = run(ids, attention_mask=mask, pad_token_id=padding, streamer=streamer, **options.for_transformers())
    new = [_up_to_end(row, ends) for row in found[:, ids.shape[1] :].tolist()]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    counts = [(len(row), len(tokens)) for row, tokens in zip(rows, new, strict=True)]
    return [Completion(prompt, text, *pair) for prompt, text, pair in zip(prompts, texts, counts, strict=True)]


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], chat: bool) -> list[list[int]]:
    """Returns the token ids of each prompt.

    Raises: UserError for an empty prompt, or a chat template that is missing.
    """
    if not prompts:
        raise UserError("there is no prompt. Give at least one.")
    if chat and not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template. Leave out chat, and write the prompt as plain text.")
    rows = [_encode(tokenizer, prompt, chat) if prompt else [] for prompt in prompts]
    for number, row in enumerate(rows, start=1):
        if not row:
            raise UserError(f"prompt {number} of {len(prompts)} is empty. Write at least one character.")
    return rows


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> list[int]:
    if not chat:
        return tokenizer(prompt)["input_ids"]
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def check_context(lengths: Sequence[int], options: Options, model: PreTrainedModel) -> None:
    """Raises: UserError if the longest prompt and its new tokens are more than the model has positions for."""
    longest, context = max(lengths), model.config.max_position_embeddings
    if longest + options.max_new_tokens <= context:
        return
    left = context - longest
    advice = f"Ask for at most {left} new tokens, or shorten" if left > 0 else "Shorten"
    raise UserError(
        f"prompt {lengths.index(longest) + 1} has {longest} tokens, and with max_new_tokens = {options.max_new_tokens} "
        f"that is more than the model's context of {context}. {advice} the prompt."
    )


def ends_of(model: PreTrainedModel) -> list[int]:
    """Returns the ids of the tokens that end a text."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def padded(rows: Sequence[Sequence[int]], padding: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns token ids with padding on the left, and the mask of what is no padding. Both [rows, longest]."""
    width = max(map(len, rows))
    ids = [[padding] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _up_to_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Returns the tokens up to the first one that ends the text, and that one."""
    number = next((number for number, token in enumerate(tokens, start=1) if token in ends), len(tokens))
    return tokens[:number]
