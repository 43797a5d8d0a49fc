"""Tiny models whose drafts are sometimes right: what the later layers add to the residual stream is made small."""

import re

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.families import VOCAB, tiny_model

SMALL = re.compile(r"layers\.[1-9].*(o_proj|down_proj|post_\w*layernorm)\.weight")
ENDS = [7, 20, 33]


def agreeing_model(variant: str, attention: str = "eager", share: float = 0.25, **changes) -> PreTrainedModel:
    model = tiny_model(variant, attention, **{"max_position_embeddings": 128, **changes}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if SMALL.search(name):
                parameter.mul_(share)
            if "embed_tokens" in name and not model.config.tie_word_embeddings:
                parameter.mul_(3)
    return model


def padded_prompts(rows: int, longest: int = 13, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths with padding on the left, and their mask. The last one has one token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (rows,), generator=generator)
    lengths[0], lengths[-1] = longest, 1 if rows > 1 else longest
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    return torch.randint(40, VOCAB, (rows, longest), generator=generator) * mask, mask
