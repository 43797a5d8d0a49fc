"""`NestedModel`, a Hugging Face model that runs any sub-network, and `extract`, which copies one into a plain model.

In: a model (with values or on the meta device), its family and a space. Out: the same object, with nested modules in
place of plain ones and its class extended by `NestedModel`. The Hugging Face API does not change. `families.nest` finds
the family.
"""

import copy
from collections.abc import Callable
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from sorted_ds.base.errors import UserError
from sorted_ds.nested.blocks import InputNestedLinear, NestedRMSNorm, OutputNestedLinear, Width
from sorted_ds.nested.costs import sorted_by_cost
from sorted_ds.nested.exits import Exits
from sorted_ds.nested.family import Family, Part, check_space, layers_of
from sorted_ds.nested.layers import SelectedLayers, attach_exits, nest_layer, set_cache_indices, subclass_of
from sorted_ds.nested.owned import OwnedModule
from sorted_ds.nested.weights import hf_buffers, hf_tensors, named_values
from sorted_ds.space import Pass, SubNet, SubNetSpace
from sorted_ds.space.passes import layers_that_run


class NestedModel(PreTrainedModel):
    """A Hugging Face model class, extended by `nest_as`."""

    hf_class: type[PreTrainedModel]
    """The plain class, which is the class of extracted models."""
    family: Family
    space: SubNetSpace
    """The space, in ascending order of parameters."""
    subnet: SubNet
    """The active sub-network."""
    widths: dict[str, Width]
    """The active width along each axis except depth, by the axis's letter."""
    whole_config: PreTrainedConfig
    """The full network's config. That of the model itself says which layers run."""
    layer_fields: dict[tuple[int, ...], dict[str, Any]]
    """The config's fields that say which layers run, by the numbers of these layers."""
    exits: Exits

    def set_subnet(self, subnet: SubNet | str) -> None:
        """Makes `subnet` the active one, without a copy. Raises: UserError if it is not in the space."""
        self.set_pass(Pass(self.space[str(subnet)]))

    def set_pass(self, pass_: Pass) -> None:
        """Prepares the next forward pass. With exits it returns the hidden states of all of them (exits.py).

        Raises: UserError if the sub-network is not in the space.
        """
        self.subnet = self.space[str(pass_.subnet)]
        for letter, width in self.widths.items():
            width.select(self.subnet[letter])
        layers = layers_that_run(pass_, self.space)
        if self.selected_layers.select(layers) and self.space.has_own_order:
            set_cache_indices(self.selected_layers)
        for key, value in self._fields_of(layers).items():
            setattr(self.config, key, value)
        shallower = [self.subnet.replace(d=depth) for depth in pass_.exits]
        self.exits.select([self._last_layer(subnet, layers) for subnet in shallower])
        for path, owned in self.owned_modules.items():
            owned.select(*(shallower if path == self.family.final_norm else ()), self.subnet)

    def _fields_of(self, layers: tuple[int, ...]) -> dict[str, Any]:
        if layers not in self.layer_fields:
            self.layer_fields[layers] = self.family.layer_fields(self.whole_config, layers)
        return self.layer_fields[layers]

    def _last_layer(self, subnet: SubNet, layers: tuple[int, ...]) -> int:
        """Returns the last of the layers that belongs to the sub-network."""
        return max(set(layers).intersection(self.space.layers_of(subnet)))

    @property
    def selected_layers(self) -> SelectedLayers:
        """The list of layers in the model."""
        layers = self.get_submodule(self.family.layers)
        assert isinstance(layers, SelectedLayers)
        return layers

    @property
    def all_layers(self) -> list[nn.Module]:
        """All layers of the full network in its own sequence, independent of the active sub-network."""
        return layers_of(self, self.family)

    @property
    def owned_modules(self) -> dict[str, OwnedModule]:
        """The modules whose copies belong to sub-networks, by their paths."""
        return {path: self.get_submodule(path) for path in self.family.owned}  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | PathLike, *args, **kwargs) -> None:
        """Writes the full network as an ordinary checkpoint. The arguments are Hugging Face's.

        The checkpoint lacks tensors that other sub-networks own: `save_full` (save.py) writes them to a side file.
        """
        extract(self, self.space.full).save_pretrained(save_directory, *args, **kwargs)


def nest_as(family: Family, model: PreTrainedModel, space: SubNetSpace) -> NestedModel:
    """Returns `model`, changed in place so that it can run every sub-network of `space`. The full one is active.

    Raises: UserError for a model that is nested already, or a space that does not fit the model.
    """
    if isinstance(model, NestedModel):
        raise UserError("the model is nested already. Nest a plain Hugging Face model.")
    check_space(space, family, model.config)
    hf_class = type(model)
    model.__class__ = subclass_of(hf_class, NestedModel, hf_class=hf_class, config_class=hf_class.config_class)
    assert isinstance(model, NestedModel)
    model.family = family
    model.space = sorted_by_cost(space, family, model.config)
    model.whole_config, model.layer_fields, model.exits = copy.deepcopy(model.config), {}, Exits()
    halves = family.halves(model.config)
    model.widths = {half.axis: Width(half.axis, space.sizes(half.axis)) for half in halves}
    for number, layer in enumerate(layers_of(model, family)):
        for half in halves:
            for part in half.parts:
                _replace_module(layer.get_submodule(half.path), part, model.widths[half.axis])
        nest_layer(layer, halves, number, model.exits)
    layers = model.get_submodule(family.layers)
    layers.__class__ = SelectedLayers
    for path, axes in family.owned.items():
        parent, _, name = path.rpartition(".")
        owners = sorted({subnet.name_along(axes) for subnet in space})
        owned = OwnedModule(model.get_submodule(path), owners, axes, space.full)
        setattr(model.get_submodule(parent), name, owned)
    attach_exits(model.get_submodule(family.final_norm), model.exits)
    model.set_subnet(model.space.full)
    return model


def _replace_module(half: nn.Module, part: Part, width: Width) -> None:
    """Replaces a plain module by a nested one."""
    parent_path, _, name = part.path.rpartition(".")
    parent = half.get_submodule(parent_path)
    plain: Any = half.get_submodule(part.path)
    weight = plain.weight.detach()
    bias = None if getattr(plain, "bias", None) is None else plain.bias.detach()
    if part.side == "norm":
        nested: nn.Module = NestedRMSNorm(weight, plain.variance_epsilon, width, part.rows)
    elif part.side == "output":
        nested = OutputNestedLinear(weight, bias, width, part.rows)
    else:
        nested = InputNestedLinear(weight.t().contiguous(), bias, width, part.rows)
    setattr(parent, name, nested)


def extract(
    model: NestedModel, subnet: SubNet | str, weight_of: Callable[[str], Tensor] | None = None
) -> PreTrainedModel:
    """Returns a sub-network as a plain Hugging Face model with copied weights, in the model's mode and dtype.

    Layers are renumbered, and owned tensors are those of the sub-network. `weight_of(name)` returns a parameter's value
    if the model does not hold it itself (ZeRO-3, a checkpoint).

    Raises: UserError if the sub-network is not in the model's space.
    """
    chosen = model.space[str(subnet)]
    tensors = hf_tensors(model, chosen, weight_of or dict(named_values(model)).__getitem__)
    like = next(iter(tensors.values()))
    config = model.family.subnet_config(full_config(model), chosen, model.space.layers_of(chosen))
    plain = empty_model(model.hf_class, config, like)
    missing, unexpected = plain.load_state_dict(tensors | hf_buffers(model, chosen), strict=False)
    tied = set(plain.all_tied_weights_keys or ())
    assert not unexpected, unexpected
    assert set(missing) <= tied, set(missing) - tied
    copy_generation_config(model, plain)
    return plain.train(model.training)


def copy_generation_config(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    """Copies the generation config to the plain model, if models of this class generate."""
    if getattr(model, "generation_config", None) is not None:
        plain.generation_config = copy.deepcopy(model.generation_config)


def full_config(model: NestedModel) -> PreTrainedConfig:
    """Returns the full network's config, independent of the active sub-network."""
    changed = model.family.layer_fields(model.whole_config, range(model.space.full.depth))
    config = type(model.config).from_dict({**model.config.to_dict(), **changed})
    config._attn_implementation = model.config._attn_implementation
    return config


def empty_model(hf_class: type[PreTrainedModel], config: PreTrainedConfig, like: Tensor) -> PreTrainedModel:
    """Returns a plain model with the dtype and device of `like`. Its buffers are set, its parameters are not."""
    with no_init_weights(), torch.device(like.device):
        model = hf_class._from_config(config, dtype=like.dtype, attn_implementation=config._attn_implementation)
    model.tie_weights()
    return model
