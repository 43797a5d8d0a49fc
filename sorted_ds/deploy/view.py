"""`view(model, subnet)`: a sub-network as a plain Hugging Face model whose weights are views of the full network's.

In: the full network, plain or nested, and a sub-network that fits in it. Out: a plain model with the sub-network's
config, built on the meta device. Each of its weights is a part of a weight of the full network, so nothing is copied:
making a view takes milliseconds, and a family of many sub-networks is one set of weights and as many light objects.

A width is the first rows of a weight, or its first columns, and depth is a choice of layers. A tensor whose part is not
one slice of memory would have to be copied: `view.num_copied_bytes` counts that.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sorted_ds.base.errors import UserError
from sorted_ds.deploy.model_dir import SORTED_JSON
from sorted_ds.families import family_of
from sorted_ds.nested import Family, NestedModel
from sorted_ds.nested.blocks import NestedModule, join
from sorted_ds.nested.bundles import contents_of
from sorted_ds.nested.nest import copy_generation_config, empty_model, full_config
from sorted_ds.nested.weights import OWNER_SEPARATOR, slice_of
from sorted_ds.space import SubNet, SubNetSpace

OWNED = "_sorted_ds_owned"
"""The attribute of a plain full network that holds the tensors that other sub-networks own, by name and owner."""


def view(model: PreTrainedModel, subnet: SubNet | str, *, space: SubNetSpace | None = None) -> PreTrainedModel:
    """Returns a sub-network as a plain Hugging Face model on the same weights, in evaluation mode.

    `model` is the full network: a plain Hugging Face model of a known family, or a nested one. The sub-network need not
    be in the space: any sizes that fit in the full network and that the family's config accepts can be viewed. `space`
    gives the layer order, along which depth counts. Without a space, the layers are taken in the network's own
    sequence; a nested model has its space.

    The view shares memory: a change of the full network's weights in place is seen at once. `.to()`, `deepcopy` and
    `save_pretrained` make copies and end the sharing. Parameters of a view do not take a gradient. Views of one model
    can be used by several threads that only read. `view.num_copied_bytes` is the memory that the view needs beside the
    full network's; it is 0 where each part of a weight is one slice.

    Raises: UserError for a sub-network that does not fit, an unknown family, a layer order that is not known, or
    weights that are not in memory.
    """
    family = model.family if isinstance(model, NestedModel) else family_of(model.config.model_type)
    config = full_config(model) if isinstance(model, NestedModel) else model.config
    chosen = _checked(subnet, family, config)
    order = _layer_order(model, family, config, space)
    layers = tuple(sorted(order[: chosen.depth]))
    tensors = dict(_tensors_of(model))
    plain = _on_meta(model, family.subnet_config(config, chosen, layers))
    names = _Names(family, chosen, family.full(config), layers)
    _assign(plain, tensors, names)
    plain.__dict__["num_copied_bytes"] = _copied_bytes(plain, model)
    copy_generation_config(model, plain)
    _dispatch(model, plain, names)
    return plain.eval()


def keep_owned(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Gives a plain full network the tensors that other sub-networks own, by name and owner: `model.norm.weight@d4`."""
    setattr(model, OWNED, dict(tensors))


def _checked(subnet: SubNet | str, family: Family, config: PreTrainedConfig) -> SubNet:
    """Returns the sub-network. Raises: UserError if it does not fit in the full network."""
    chosen, full = SubNet.parse(str(subnet)), family.full(config)
    if chosen.axes != full.axes or not chosen.is_within(full):
        raise UserError(f"{chosen} is not a part of {full}. Name sizes along the same axes, none of them larger.")
    family.check(SubNetSpace({chosen, full}), config)
    return chosen


def _layer_order(
    model: PreTrainedModel, family: Family, config: PreTrainedConfig, space: SubNetSpace | None
) -> Sequence[int]:
    """Returns the layer order along which depth counts. Raises: UserError if it is not known, or of another model."""
    full = family.full(config)
    if space is None and isinstance(model, NestedModel):
        space = model.space
    if space is not None:
        if space.full != full:
            raise UserError(f"the space's largest sub-network is {space.full}, but the model is {full}.")
        return space.layer_order
    own = list(range(full.depth))
    if (stated := _stated_order(model)) and stated != own:
        raise UserError(
            f"the model was loaded from {model.name_or_path}, whose {SORTED_JSON} has a layer order of its own. "
            "Give its space: view(model, name, space=...). sorted_ds.load(DIR) knows it."
        )
    return own


def _stated_order(model: PreTrainedModel) -> list[int] | None:
    """Returns the layer order in sorted.json of the directory that a model was loaded from, if there is one."""
    with suppress(OSError, ValueError, AttributeError):
        facts = json.loads((Path(model.name_or_path or "") / SORTED_JSON).read_text(encoding="utf-8"))
        return facts.get("layer_order") or None
    return None


def _tensors_of(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yields all tensors of the full network by their Hugging Face names, with the owner for owned ones.

    Raises: UserError if some are not in memory.
    """
    if any(contents.bundle is not None for contents in contents_of(model).values()):
        raise UserError("the model's weights are in ZeRO-3's shards. Extract a sub-network, or view the trained model.")
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    if away := [name for name, tensor in tensors if tensor.is_meta]:
        raise UserError(f"{away[0]} is not in memory: it is offloaded. Load the model without offload to CPU or disk.")
    nested = {path: module for path, module in model.named_modules() if isinstance(module, NestedModule)}
    for name, tensor in tensors:
        if ".blocks." not in name:
            yield slice_of(name).key, tensor.detach()
    for path, module in nested.items():
        for kind in module.parameter_names:
            whole = join([getattr(block, kind).detach() for block in module.blocks])
            yield f"{path}.{kind}", whole.t() if module.transposed else whole
    yield from getattr(model, OWNED, {}).items()


def _on_meta(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    hf_class = model.hf_class if isinstance(model, NestedModel) else type(model)
    return empty_model(hf_class, config, torch.empty(0, dtype=model.dtype, device="meta"))


class _Names:
    """Finds the full network's tensor for each tensor of a view."""

    def __init__(self, family: Family, chosen: SubNet, full: SubNet, layers: Sequence[int]):
        self.family, self.chosen, self.full, self.layers = family, chosen, full, layers
        self.prefix = f"{family.layers}."

    def of(self, name: str) -> str:
        """Returns the name in the full network, which numbers all of its layers."""
        if not name.startswith(self.prefix):
            return name
        number, dot, rest = name.removeprefix(self.prefix).partition(".")
        return f"{self.prefix}{self.layers[int(number)]}{dot}{rest}"

    def find(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns the whole tensor. Raises: UserError if the sub-network owns it and the model does not have it."""
        name = self.of(name)
        for axes in (axes for path, axes in self.family.owned.items() if name.rpartition(".")[0] == path):
            own = f"{name}{OWNER_SEPARATOR}{self.chosen.name_along(axes)}"
            if own in tensors:
                return tensors[own]
            if self.chosen.name_along(axes) != self.full.name_along(axes):
                raise UserError(
                    f"{own} is not in the model: {self.chosen} owns it. Load the family with sorted_ds.load."
                )
        return tensors[name]


def _assign(plain: PreTrainedModel, tensors: Mapping[str, Tensor], names: _Names) -> None:
    """Gives each parameter and buffer of a model on the meta device its part of the full network's tensor."""
    nested = {f"{half.path}.{part.path}" for half in names.family.halves(plain.config) for part in half.parts}
    for path, module in plain.named_modules():
        is_cut = path.startswith(names.prefix) and any(path.endswith(f".{part}") for part in nested)
        for kind, parameter in module._parameters.items():
            if parameter is not None:
                whole = names.find(f"{path}.{kind}", tensors)
                part = whole[tuple(map(slice, parameter.shape))] if is_cut else whole
                assert part.shape == parameter.shape, f"{path}.{kind} is not a slice of the full network's"
                module._parameters[kind] = nn.Parameter(part, requires_grad=False)
        for kind, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[kind] = names.find(f"{path}.{kind}".lstrip("."), tensors)
    plain.tie_weights()


def _copied_bytes(plain: PreTrainedModel, model: PreTrainedModel) -> int:
    """Returns the bytes of the view's tensors that do not lie in the full network's memory."""
    tensors = (*model.parameters(), *model.buffers(), *getattr(model, OWNED, {}).values())
    shared = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    own = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in plain.parameters()}
    return sum(size for pointer, size in own.items() if pointer not in shared)


def _dispatch(model: PreTrainedModel, plain: PreTrainedModel, names: _Names) -> None:
    """Lets a view of a model on several devices move its activations between them as the model does."""
    devices = getattr(model, "hf_device_map", None)
    if not devices or len(devices) == 1:
        return
    from accelerate import dispatch_model

    paths = {names.of(path): path for path, _ in plain.named_modules() if path}
    known = {paths[path]: device for path, device in devices.items() if path in paths}
    dispatch_model(plain, device_map=known, force_hooks=True)
