"""`nest(model, space)`: a Hugging Face model that can run any sub-network. `extract`: one of them as a plain model.

In: a causal language model of a known family (real or on the meta device) and a space. Out: the same object, its
nested layers swapped and its class extended by `NestedModel`. The Hugging Face API stays as it is.
"""

import copy
from collections.abc import Callable
from os import PathLike

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from sorted_ds.base.errors import UserError
from sorted_ds.families.decoder import (
    check_space,
    family_of,
    head_dim,
    per_layer_fields,
    queries_per_group,
    subnet_config,
)
from sorted_ds.nested.classes import extended
from sorted_ds.nested.costs import sorted_by_cost
from sorted_ds.nested.decoder_layer import nest_decoder_layer
from sorted_ds.nested.layers import InputNestedLinear, NestedRMSNorm, OutputNestedLinear, Width
from sorted_ds.nested.weights import hf_tensors, named_values
from sorted_ds.space import SubNet, SubNetSpace


class NestedModel(PreTrainedModel):
    """What `nest` adds to a Hugging Face class."""

    hf_class: type[PreTrainedModel]
    """The plain class, which extracted models have."""
    space: SubNetSpace
    """Ascending in parameters."""
    subnet: SubNet
    """The sub-network that runs now."""
    group_width: Width
    ffn_width: Width
    full_layer_lists: dict[str, list]
    """The full network's values of the config's lists with one entry a layer."""

    def set_subnet(self, subnet: SubNet | str) -> None:
        """Runs `subnet` from now on. Copies nothing. Raises: UserError when it is not in the space."""
        self.subnet = self.space[str(subnet)]
        self.group_width.select(self.subnet.groups)
        self.ffn_width.select(self.subnet.ffn)
        self.config.num_hidden_layers = self.subnet.depth
        for key, whole in self.full_layer_lists.items():
            setattr(self.config, key, whole[: self.subnet.depth])

    def save_pretrained(self, save_directory: str | PathLike, *args, **kwargs) -> None:
        """Writes the full network as an ordinary checkpoint, whatever runs now. Arguments as in Hugging Face."""
        extract(self, self.space.full).save_pretrained(save_directory, *args, **kwargs)


def nest(model: PreTrainedModel, space: SubNetSpace) -> NestedModel:
    """Makes `model` able to run every sub-network of `space`, in place, and returns it running the full one.

    Output-side weights become views of the model's own; input-side ones are copied once, transposed.

    Raises: UserError for an unknown family, a model that is nested already, or a space that does not fit it.
    """
    if isinstance(model, NestedModel):
        raise UserError("the model is nested already. Nest a plain Hugging Face model.")
    family = family_of(model.config.model_type)
    check_space(space, model.config)
    hf_class = type(model)
    model.__class__ = extended(hf_class, NestedModel, hf_class=hf_class, config_class=hf_class.config_class)
    assert isinstance(model, NestedModel)
    model.space = sorted_by_cost(space, model.config)
    model.full_layer_lists = per_layer_fields(model.config, model.config.num_hidden_layers)
    model.group_width, model.ffn_width = Width(space.groups), Width(space.ffn)
    for layer in model.model.layers:
        _nest_attention(layer.self_attn, model, family.nested_head_norms)
        _nest_mlp(layer.mlp, model.ffn_width)
        nest_decoder_layer(layer)
    model.set_subnet(model.space.full)
    return model


def _nest_attention(attention: nn.Module, model: NestedModel, norms: tuple[str, ...]) -> None:
    """q, k, v by output rows, o by input rows; a query projection has `queries_per_group` heads a group."""
    width, channels = model.group_width, head_dim(model.config)
    query_rows = channels * queries_per_group(model.config)
    for name, rows in (("q_proj", query_rows), ("k_proj", channels), ("v_proj", channels)):
        _swap_output(attention, name, width, rows)
    _swap_input(attention, "o_proj", width, query_rows)
    for name in norms:
        norm = getattr(attention, name)
        rows = query_rows if name.startswith("q") else channels
        setattr(attention, name, NestedRMSNorm(norm.weight.detach(), norm.variance_epsilon, width, rows))


def _nest_mlp(mlp: nn.Module, width: Width) -> None:
    for name in ("gate_proj", "up_proj"):
        _swap_output(mlp, name, width, 1)
    _swap_input(mlp, "down_proj", width, 1)


def _swap_output(parent: nn.Module, name: str, width: Width, rows_per_size: int) -> None:
    linear = getattr(parent, name)
    bias = None if linear.bias is None else linear.bias.detach()
    setattr(parent, name, OutputNestedLinear(linear.weight.detach(), bias, width, rows_per_size))


def _swap_input(parent: nn.Module, name: str, width: Width, rows_per_size: int) -> None:
    linear = getattr(parent, name)
    bias = None if linear.bias is None else linear.bias.detach()
    setattr(parent, name, InputNestedLinear(linear.weight.detach().t().contiguous(), bias, width, rows_per_size))


def extract(
    model: NestedModel, subnet: SubNet | str, weight_of: Callable[[str], Tensor] | None = None
) -> PreTrainedModel:
    """A plain Hugging Face model with its own weights and its own, smaller config, in the model's mode and dtype.

    `weight_of(name)` gives a parameter's value where the model does not hold it itself (ZeRO-3, a checkpoint).

    Raises: UserError when the sub-network is not in the model's space.
    """
    active = model.space[str(subnet)]
    tensors = hf_tensors(model, active, weight_of or dict(named_values(model)).__getitem__)
    whole = full_config(model)
    plain = empty_model(model.hf_class, subnet_config(whole, active), next(iter(tensors.values())))
    missing, unexpected = plain.load_state_dict(tensors, strict=False)
    tied = set(plain.all_tied_weights_keys or ())
    assert not unexpected, unexpected
    assert set(missing) <= tied, set(missing) - tied
    plain.generation_config = copy.deepcopy(model.generation_config)
    return plain.train(model.training)


def full_config(model: NestedModel) -> PreTrainedConfig:
    """The full network's config, whatever runs now."""
    changed = {**model.full_layer_lists, "num_hidden_layers": model.space.full.depth}
    config = type(model.config).from_dict({**model.config.to_dict(), **changed})
    config._attn_implementation = model.config._attn_implementation
    return config


def empty_model(hf_class: type[PreTrainedModel], config: PreTrainedConfig, like: Tensor) -> PreTrainedModel:
    """A plain model whose parameters are not set yet, with the dtype and device of `like`; its buffers are."""
    with no_init_weights(), torch.device(like.device):
        model = hf_class._from_config(config, dtype=like.dtype, attn_implementation=config._attn_implementation)
    model.tie_weights()
    return model
