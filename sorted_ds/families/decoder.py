"""The table of model families: which layers of a Hugging Face decoder are nested, and in which dimension.

All families here share Hugging Face's names for the projections, infer the number of heads from the projection's
output (`view(..., -1, head_dim)`) and loop over `layers[: config.num_hidden_layers]`, so a family is its exceptions.
Source: transformers 5.24, models/*/modeling_*.py. How to add one: CONTRIBUTING.md, "A model family".
"""

import copy
from dataclasses import dataclass

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from sorted_ds.base.errors import UserError
from sorted_ds.space import SubNet, SubNetSpace


@dataclass(frozen=True)
class Family:
    """How a family differs from llama."""

    nested_head_norms: tuple[str, ...] = ()
    """Norms in `self_attn` that run across all heads; per-head norms (qwen3) need nothing."""
    softcap_key: str = ""
    """Config key of the cap on the logits: `cap * tanh(logits / cap)`."""
    logits_divisor_key: str = ""
    """Config key of the number that logits are divided by."""

    def logits_softcap(self, config: PreTrainedConfig) -> float | None:
        return getattr(config, self.softcap_key) if self.softcap_key else None

    def logits_divisor(self, config: PreTrainedConfig) -> float:
        return getattr(config, self.logits_divisor_key) if self.logits_divisor_key else 1.0


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma2": Family(softcap_key="final_logit_softcapping"),
    "olmo2": Family(nested_head_norms=("q_norm", "k_norm")),
    "granite": Family(logits_divisor_key="logits_scaling"),
}

PER_LAYER_KEYS = ("layer_types", "no_rope_layers")
"""Config lists with one entry a layer, cut with the depth."""


def family_of(model_type: str) -> Family:
    """Raises: UserError that names the known families and how to add one."""
    if model_type not in FAMILIES:
        raise UserError(
            f"model family {model_type!r} is not known. Known: {', '.join(FAMILIES)}. "
            "To add one, see 'A model family' in CONTRIBUTING.md."
        )
    return FAMILIES[model_type]


def head_dim(config: PreTrainedConfig) -> int:
    """Channels of one head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def queries_per_group(config: PreTrainedConfig) -> int:
    return config.num_attention_heads // config.num_key_value_heads


def full_size(config: PreTrainedConfig) -> SubNet:
    """The full network as a sub-network of itself."""
    return SubNet(config.num_hidden_layers, config.num_key_value_heads, config.intermediate_size)


def subnet_config(config: PreTrainedConfig, subnet: SubNet) -> PreTrainedConfig:
    """The plain Hugging Face config of a sub-network; `head_dim` is written out, lists of layers are cut.

    Raises: whatever the family's config class refuses with (ValueError or StrictDataclassError).
    """
    fields = copy.deepcopy(config.to_dict())
    fields.update(per_layer_fields(config, subnet.depth))
    fields.update(
        num_hidden_layers=subnet.depth,
        num_attention_heads=subnet.groups * queries_per_group(config),
        num_key_value_heads=subnet.groups,
        intermediate_size=subnet.ffn,
        head_dim=head_dim(config),
    )
    cut = type(config).from_dict(fields)
    cut._attn_implementation = config._attn_implementation
    return cut


def per_layer_fields(config: PreTrainedConfig, depth: int) -> dict[str, list]:
    return {key: list(getattr(config, key)[:depth]) for key in PER_LAYER_KEYS if getattr(config, key, None)}


def check_space(space: SubNetSpace, config: PreTrainedConfig) -> None:
    """Raises: UserError when the space and the model's sizes differ, or the family's config refuses a sub-network."""
    full = full_size(config)
    if config.num_attention_heads % full.groups:
        raise UserError(
            f"the model has {config.num_attention_heads} attention heads and {full.groups} key/value heads: "
            "the first must be a multiple of the second. Change one of them."
        )
    if space.full != full:
        raise UserError(
            f"the space's largest sub-network is {space.full}, but the model has {full.depth} layers, {full.groups} "
            f"attention groups and {full.ffn} feed-forward channels. Make {full} the largest."
        )
    for groups in space.groups:
        if not _is_valid(config, groups):
            heads = groups * queries_per_group(config)
            raise UserError(
                f"space.groups contains {groups}: that is {heads} heads, and {config.model_type} needs hidden_size "
                f"{config.hidden_size} divisible by the number of heads. "
                f"Nearest that work: {', '.join(map(str, _nearest_valid(config, groups)))}."
            )


def _is_valid(config: PreTrainedConfig, groups: int) -> bool:
    """Whether the family's own config class takes this number of groups. Only its architecture check can refuse it."""
    try:
        subnet_config(config, SubNet(config.num_hidden_layers, groups, config.intermediate_size))
    except (ValueError, StrictDataclassError):
        return False
    return True


def _nearest_valid(config: PreTrainedConfig, groups: int) -> list[int]:
    """The nearest valid numbers of groups under and over."""
    valid = [g for g in range(1, config.num_key_value_heads + 1) if _is_valid(config, g)]
    under = [g for g in valid if g < groups][-1:]
    over = [g for g in valid if g > groups][:1]
    return under + over
