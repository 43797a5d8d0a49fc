"""The table of decoder families: which weights of a Hugging Face decoder are nested, and along which axis.

In: the config of a decoder. Out: its `Family`. All families here use Hugging Face's names for the projections, infer
the number of heads from the projection's output (`view(..., -1, head_dim)`) and loop over
`layers[: config.num_hidden_layers]`, so an entry of the table lists only how a family differs from llama.
Source: transformers 5.24, models/*/modeling_*.py. How to add one: docs/add-a-family.md.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from sorted_ds.base.errors import UserError
from sorted_ds.nested.family import Half, LogitsRule, Part
from sorted_ds.space import SubNet, SubNetSpace

PER_LAYER_KEYS = ("layer_types", "no_rope_layers")
"""The config's lists that have one entry for each layer."""


@dataclass(frozen=True)
class Decoder:
    """A decoder family, given by how it differs from llama."""

    nested_head_norms: tuple[str, ...] = ()
    """The norms in `self_attn` that run across all heads. A norm within each head (qwen3) is not nested."""
    softcap_key: str = ""
    """The config key of the cap on the logits: `cap * tanh(logits / cap)`."""
    logits_divisor_key: str = ""
    """The config key of the number that divides the logits."""
    embeddings_factor_key: str = ""
    """The config key of the number by which the body multiplies its `inputs_embeds`."""
    auto_class: Any = AutoModelForCausalLM
    axes: tuple[str, ...] = ("d", "g", "f")
    layers: str = "model.layers"
    body: str = "model"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    owned: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def full(self, config: PreTrainedConfig) -> SubNet:
        """Returns the sizes of the full network."""
        return SubNet(d=config.num_hidden_layers, g=config.num_key_value_heads, f=config.intermediate_size)

    def halves(self, config: PreTrainedConfig) -> tuple[Half, ...]:
        """Returns the attention, nested along `g` by whole groups, and the feed-forward half, nested along `f`."""
        head = head_dim(config)
        query_rows = head * queries_per_group(config)
        norms = (Part(name, "norm", query_rows if name.startswith("q") else head) for name in self.nested_head_norms)
        attention = (
            Part("q_proj", "output", query_rows),
            Part("k_proj", "output", head),
            Part("v_proj", "output", head),
            Part("o_proj", "input", query_rows),
            *norms,
        )
        mlp = (Part("gate_proj", "output", 1), Part("up_proj", "output", 1), Part("down_proj", "input", 1))
        return Half("self_attn", "g", attention), Half("mlp", "f", mlp)

    def subnet_config(self, config: PreTrainedConfig, subnet: SubNet, layers: Sequence[int]) -> PreTrainedConfig:
        """Returns the plain config of a sub-network with these layers, with `head_dim` written out.

        Raises: ValueError or StrictDataclassError if the family's config class refuses the sizes.
        """
        fields = copy.deepcopy(config.to_dict())
        fields.update(self.layer_fields(config, layers))
        fields.update(
            num_attention_heads=subnet["g"] * queries_per_group(config),
            num_key_value_heads=subnet["g"],
            intermediate_size=subnet["f"],
            head_dim=head_dim(config),
        )
        cut = type(config).from_dict(fields)
        cut._attn_implementation = config._attn_implementation
        return cut

    def continued_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Returns the config with a factor of 1. Where the embedding layer itself scales (gemma2), nothing changes."""
        factor = {self.embeddings_factor_key: 1.0} if self.embeddings_factor_key else {}
        continued = type(config).from_dict({**config.to_dict(), **factor})
        continued._attn_implementation = config._attn_implementation
        return continued

    def layer_fields(self, config: PreTrainedConfig, layers: Sequence[int]) -> dict[str, Any]:
        """Returns the number of layers, and the entries of these layers in the lists with one entry for each layer."""
        lists = {key: getattr(config, key) for key in PER_LAYER_KEYS if getattr(config, key, None)}
        return {"num_hidden_layers": len(layers), **{key: [lists[key][n] for n in layers] for key in lists}}

    def check(self, space: SubNetSpace, config: PreTrainedConfig) -> None:
        """Raises: UserError if the heads cannot be divided into groups, or the family refuses a number of groups."""
        if config.num_attention_heads % config.num_key_value_heads:
            raise UserError(
                f"the model has {config.num_attention_heads} attention heads and {config.num_key_value_heads} "
                "key/value heads: the first must be a multiple of the second. Change one of them."
            )
        for groups in space.sizes("g"):
            if not self._is_valid(config, groups):
                raise UserError(
                    f"space.groups contains {groups}: that is {groups * queries_per_group(config)} heads, and "
                    f"{config.model_type} needs hidden_size {config.hidden_size} divisible by the number of heads. "
                    f"Nearest that work: {', '.join(map(str, self._nearest_valid(config, groups)))}."
                )

    def _is_valid(self, config: PreTrainedConfig, groups: int) -> bool:
        """Returns whether the family's config class accepts this number of groups."""
        full = self.full(config)
        try:
            self.subnet_config(config, full.replace(g=groups), range(full.depth))
        except (ValueError, StrictDataclassError):
            return False
        return True

    def _nearest_valid(self, config: PreTrainedConfig, groups: int) -> list[int]:
        """Returns the nearest smaller and the nearest larger valid number of groups."""
        valid = [g for g in range(1, config.num_key_value_heads + 1) if self._is_valid(config, g)]
        return [g for g in valid if g < groups][-1:] + [g for g in valid if g > groups][:1]

    def logits_rule(self, config: PreTrainedConfig) -> LogitsRule:
        """Returns the rule for the head's output."""
        divisor = getattr(config, self.logits_divisor_key) if self.logits_divisor_key else 1.0
        return LogitsRule(divisor, getattr(config, self.softcap_key) if self.softcap_key else None)

    def mixing_flops(self, config: PreTrainedConfig, subnet: SubNet, row_tokens: int) -> int:
        """Returns the FLOPs of queries times keys and of attention weights times values, for one layer and token."""
        return 4 * row_tokens * subnet["g"] * queries_per_group(config) * head_dim(config)

    def kv_elements(self, config: PreTrainedConfig, subnet: SubNet) -> int:
        """Returns the elements of a key and a value for each group."""
        return 2 * subnet["g"] * head_dim(config)

    def hidden_states(self, body: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns the last hidden states, after the final norm. Shapes: input_ids [B, T] -> [B, T, H].

        `position_ids` that start again in a row isolate what is before from what follows.
        """
        positions = batch.get("position_ids")
        return body(input_ids=batch["input_ids"], position_ids=positions, use_cache=False).last_hidden_state


def head_dim(config: PreTrainedConfig) -> int:
    """Returns the number of channels of one head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def queries_per_group(config: PreTrainedConfig) -> int:
    """Returns the number of query heads for each key/value head."""
    return config.num_attention_heads // config.num_key_value_heads


DECODERS = {
    "llama": Decoder(),
    "mistral": Decoder(),
    "qwen2": Decoder(),
    "qwen3": Decoder(),
    "gemma2": Decoder(softcap_key="final_logit_softcapping"),
    "olmo2": Decoder(nested_head_norms=("q_norm", "k_norm")),
    "granite": Decoder(logits_divisor_key="logits_scaling", embeddings_factor_key="embedding_multiplier"),
}
"""The decoder families by Hugging Face's `model_type`."""
