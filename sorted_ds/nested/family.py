"""`Family`: the one object that answers everything that is particular to an architecture.

In: a Hugging Face config or model of the family. Out: its axes, where its layers and layer halves lie, which axis nests
which weight, its head, the config of a sub-network, and what a layer computes beside matrix products. The tables are in
`families/`; nothing else in the package names a path or a key of an architecture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sorted_ds.base.errors import UserError
from sorted_ds.space import SubNet, SubNetSpace


@dataclass(frozen=True)
class Part:
    """One module of a layer half whose weight is nested."""

    path: str
    """Where it lies in the half, like `q_proj`."""
    side: Literal["output", "input", "norm"]
    """Which side of the weight is nested: output features, input features, or the channels of an RMS norm."""
    rows: int
    """Features, or channels, for each unit of the axis's size."""


@dataclass(frozen=True)
class Half:
    """A layer half: one module of a layer, called once in a pass, whose weights are all nested along one axis."""

    path: str
    """Where the module lies in the layer, like `self_attn`."""
    axis: str
    """The letter of the axis."""
    parts: tuple[Part, ...]
    """The linear layers stand in the order of their rows in a bundle (bundles.py)."""


@dataclass(frozen=True)
class LogitsRule:
    """What a family does to the head's output: divide it, then cap it by `softcap * tanh(logits / softcap)`."""

    divisor: float = 1.0
    softcap: float | None = None


class Family(Protocol):
    """What the nested code, the engine and the losses ask about an architecture."""

    @property
    def auto_class(self) -> Any:
        """transformers' class that makes, loads and registers its models, like `AutoModelForCausalLM`."""

    @property
    def axes(self) -> tuple[str, ...]:
        """The letters of its axes, in the order of its sub-networks' names. Depth is one of them."""

    @property
    def layers(self) -> str:
        """The path of the list of layers in the model, like `model.layers`."""

    @property
    def body(self) -> str:
        """The path of the module whose call gives the last hidden states, like `model`."""

    @property
    def head(self) -> str:
        """The path of the output head, a linear layer without bias, like `lm_head`."""

    @property
    def owned(self) -> Mapping[str, tuple[str, ...]]:
        """Paths of modules of which each size along these axes owns a copy, like `{"model.norm": ("d",)}`."""

    def full(self, config: PreTrainedConfig) -> SubNet:
        """The full network, as a sub-network of itself."""

    def halves(self, config: PreTrainedConfig) -> tuple[Half, ...]:
        """The halves of each layer."""

    def subnet_config(self, config: PreTrainedConfig, subnet: SubNet, layers: Sequence[int]) -> PreTrainedConfig:
        """The plain Hugging Face config of a sub-network that has these layers of the full network.

        Raises: whatever the family's config class refuses with (ValueError or StrictDataclassError).
        """

    def layer_fields(self, config: PreTrainedConfig, layers: Sequence[int]) -> dict[str, Any]:
        """The config's fields that say which layers run: their number, and the entries of these layers in lists."""

    def check(self, space: SubNetSpace, config: PreTrainedConfig) -> None:
        """Raises: UserError when the config of a sub-network of the space would not be valid."""

    def logits_rule(self, config: PreTrainedConfig) -> LogitsRule:
        """What the head's output goes through."""

    def mixing_flops(self, config: PreTrainedConfig, subnet: SubNet, row_tokens: int) -> int:
        """Forward FLOPs of one layer for one token, beside the products with weights: attention over `row_tokens`."""

    def kv_elements(self, config: PreTrainedConfig, subnet: SubNet) -> int:
        """Elements that one layer keeps in the key/value cache for one token."""

    def hidden_states(self, body: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The last hidden states of a batch's inputs. Shapes: token ids [B, T] -> [B, T, H]."""


def check_space(space: SubNetSpace, family: Family, config: PreTrainedConfig) -> None:
    """Raises: UserError when space and model differ in axes or sizes, or a sub-network's config is not valid."""
    if space.axes != family.axes:
        raise UserError(
            f"the space's sub-networks are named like {space.full}, but {config.model_type} has the axes "
            f"{', '.join(family.axes)}. Give sizes along exactly these."
        )
    full = family.full(config)
    if space.full != full:
        raise UserError(
            f"the space's largest sub-network is {space.full}, but the model is {full}. Make {full} the largest."
        )
    family.check(space, config)


def layers_of(model: PreTrainedModel, family: Family) -> list[nn.Module]:
    """All layers of the full network, in its own sequence, whatever runs now."""
    return list(model.get_submodule(family.layers).children())
