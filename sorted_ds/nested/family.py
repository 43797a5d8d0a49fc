"""`Family`: the protocol of the object that knows everything particular to an architecture.

In: a Hugging Face config or model of the family. Out: the axes, the paths of layers and halves, the axis of each nested
weight, the head, the config of a sub-network, and the costs of a layer beside its weights. The implementations are in
`families/`; nothing else in the package names a path or a config key of an architecture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sorted_ds.base.errors import UserError
from sorted_ds.space import AXES, SubNet, SubNetSpace


@dataclass(frozen=True)
class Part:
    """One module of a layer half whose weight is nested."""

    path: str
    """The module's path in the half, like `q_proj`."""
    side: Literal["output", "input", "norm"]
    """The nested side of the weight: output features, input features, or the channels of an RMS norm."""
    rows: int
    """The number of features or channels for each unit of the axis's size."""


@dataclass(frozen=True)
class Half:
    """One module of a layer that is called once in a pass and whose weights are all nested along one axis."""

    path: str
    """The module's path in the layer, like `self_attn`."""
    axis: str
    """The letter of the axis."""
    parts: tuple[Part, ...]
    """The nested modules. The linear layers' rows have this order in a bundle (bundles.py)."""


@dataclass(frozen=True)
class LogitsRule:
    """A rule for the head's output: it is divided, and then capped by `softcap * tanh(logits / softcap)`."""

    divisor: float = 1.0
    softcap: float | None = None


class Family(Protocol):
    """What the nested code, the engine and the losses ask about an architecture."""

    @property
    def auto_class(self) -> Any:
        """The transformers class that makes, loads and registers models, like `AutoModelForCausalLM`."""

    @property
    def axes(self) -> tuple[str, ...]:
        """The letters of the axes, in the order of sub-network names. Depth is one of the axes."""

    @property
    def layers(self) -> str:
        """The path of the list of layers in the model, like `model.layers`."""

    @property
    def body(self) -> str:
        """The path of the module that returns the last hidden states, like `model`."""

    @property
    def final_norm(self) -> str:
        """The path of the norm after the last layer, like `model.norm`. The body calls it with the hidden states."""

    @property
    def head(self) -> str:
        """The path of the output head, a linear layer without bias, like `lm_head`."""

    @property
    def owned(self) -> Mapping[str, tuple[str, ...]]:
        """The axes whose sizes own copies of a module, by the module's path, like `{"model.norm": ("d",)}`."""

    def full(self, config: PreTrainedConfig) -> SubNet:
        """Returns the sizes of the full network."""

    def halves(self, config: PreTrainedConfig) -> tuple[Half, ...]:
        """Returns the halves that each layer has."""

    def subnet_config(self, config: PreTrainedConfig, subnet: SubNet, layers: Sequence[int]) -> PreTrainedConfig:
        """Returns the plain Hugging Face config of a sub-network with these layers of the full network.

        Raises: ValueError or StrictDataclassError if the family's config class refuses the sizes.
        """

    def continued_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Returns the config of a model that takes hidden states of a layer in place of embeddings, as they are."""

    def layer_fields(self, config: PreTrainedConfig, layers: Sequence[int]) -> dict[str, Any]:
        """Returns the config's fields that depend on the layers: their number, and lists with an entry for each."""

    def check(self, space: SubNetSpace, config: PreTrainedConfig) -> None:
        """Raises: UserError if the config of a sub-network of the space would not be valid."""

    def logits_rule(self, config: PreTrainedConfig) -> LogitsRule:
        """Returns the rule for the head's output."""

    def mixing_flops(self, config: PreTrainedConfig, subnet: SubNet, row_tokens: int) -> int:
        """Returns a layer's forward FLOPs for one token without weights: attention over `row_tokens` positions."""

    def kv_elements(self, config: PreTrainedConfig, subnet: SubNet) -> int:
        """Returns the number of key/value cache elements for one layer and token."""

    def hidden_states(self, body: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns the last hidden states of a batch. Shapes: token ids [B, T] -> [B, T, H]."""


def check_space(space: SubNetSpace, family: Family, config: PreTrainedConfig) -> None:
    """Raises: UserError if space and model differ in axes or sizes, or a sub-network's config is not valid."""
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


def cuttable(space: SubNetSpace, family: Family) -> SubNetSpace:
    """Returns every sub-network that can be cut from a network that was trained on `space`, trained or not.

    The depth is any from the smallest to the largest that was trained. A width is one that was trained with some depth:
    channels between two widths were only trained together, so none of them is more important than the others. The
    tensors that the sub-network owns belong to one that was trained.
    """
    grid = SubNetSpace.grid(**{AXES[letter].sizes: space.sizes(letter) for letter in space.axes})
    depths = range(min(subnet.depth for subnet in space), space.full.depth + 1)
    owners = {axes: {subnet.name_along(axes) for subnet in space} for axes in family.owned.values()}
    every = {subnet.replace(d=depth) for subnet in grid for depth in depths}
    return SubNetSpace(
        (subnet for subnet in every if all(subnet.name_along(axes) in names for axes, names in owners.items())),
        layer_order=space.layer_order,
    )


def layers_of(model: PreTrainedModel, family: Family) -> list[nn.Module]:
    """Returns all layers of the full network in its own sequence, independent of the active sub-network."""
    return list(model.get_submodule(family.layers).children())
