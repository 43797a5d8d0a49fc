"""Tiny plain models of every family, with every parameter random: fresh norms and biases would hide mis-slicing."""

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from sorted_ds.space import SubNetSpace

VOCAB = 131
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
VARIANTS: dict[str, dict] = {
    "llama": {},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, tied": {"tie_word_embeddings": True},
    "mistral, sliding": {"sliding_window": 5},
    "qwen2, biases, sliding": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen3, head norms": {"head_dim": 16},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 20,
        "sliding_window": 5,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 2.0,
    },
    "olmo2": {},
    "olmo2, no grouping": {"num_attention_heads": 4},
    "granite": {
        "embedding_multiplier": 6.0,
        "logits_scaling": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "attention_bias": True,
        "mlp_bias": True,
    },
}
SPACE = SubNetSpace.grid(depths=[1, 2, 4], groups=[1, 3, 4], ffn=[32, 80, 112])
SUBNETS = ["d1-g1-f32", "d4-g4-f112", "d2-g3-f112", "d4-g1-f80", "d1-g4-f32", "d2-g1-f80"]
"""The smallest, the full and mixed ones."""


def tiny_config(variant: str, **changes) -> PreTrainedConfig:
    return AutoConfig.for_model(variant.split(",")[0], **{**SIZES, **VARIANTS[variant], **changes})


def tiny_model(variant: str, attention: str = "eager", seed: int = 0, **changes) -> PreTrainedModel:
    """A plain model in fp32. Its logits are of the order of 1, so that a cap or a missing divisor shows."""
    config = tiny_config(variant, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() == 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=spread)
    return model.train()


def tokens(rows: int = 2, length: int = 12, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
