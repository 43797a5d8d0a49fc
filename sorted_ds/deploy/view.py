"""`view(model, subnet)`: a sub-network as a plain Hugging Face model whose weights are views of the full network's.

In: the full network, plain or nested, and a sub-network that fits in it. Out: a plain model with the sub-network's
config, built on the meta device. Each of its weights is a part of a weight of the full network, so nothing is copied:
making a view takes milliseconds, and a family of many sub-networks is one set of weights and as many light objects.

A width is the first rows of a weight, or its first columns, and depth is a choice of layers. A tensor whose part is not
one slice of memory would have to be copied: `view.num_copied_bytes` counts that.
"""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sorted_ds.base.errors import UserError
from sorted_ds.deploy.model_dir import SORTED_JSON
from sorted_ds.families import family_of
from sorted_ds.nested import Family, NestedModel
from sorted_ds.nested.blocks import NestedModule, join
from sorted_ds.nested.bundles import contents_of
from sorted_ds.nested.load import materialize_buffers
from sorted_ds.nested.nest import copy_generation_config, empty_model, full_config
from sorted_ds.nested.weights import OWNER_SEPARATOR, slice_of
from sorted_ds.space import SubNet, SubNetSpace

MAKING = threading.Lock()
"""Held while a model is made: transformers changes global settings of torch meanwhile."""
OWNED = "_sorted_ds_owned"
"""The attribute of a plain full network that holds the tensors that other sub-networks own, by name and owner."""


def view(model: PreTrainedModel, subnet: SubNet | str, *, space: SubNetSpace | None = None) -> PreTrainedModel:
    """Returns a sub-network as a plain Hugging Face model on the same weights, in evaluation mode.

    `model` is the full network: a plain Hugging Face model of a known family, or a nested one. The sub-network need not
    be in the space: any sizes that fit in the full network and that the family's config accepts can be viewed. `space`
    gives the layer order, along which depth counts. Without a space, the layers are taken in the network's own
    sequence; a nested model has its space.

    The view shares memory: a change of the full network's weights in place is seen at once. `deepcopy` and
    `save_pretrained` make copies, and `.to()` ends the sharing. Parameters of a view do not take a gradient. Threads
    can make views, and use views of one model, at the same time. `view.num_copied_bytes` is the memory that the view
    needs beside the full network's; it is 0 where each part of a weight is one slice.

    Raises: UserError for a sub-network that does not fit, an unknown family, a layer order that is not known, or
    weights that are not in memory.
    """
    return _viewed(model, subnet, space)


def tail_view(
    model: PreTrainedModel, subnet: SubNet | str, first: int, *, space: SubNetSpace | None = None
) -> PreTrainedModel:
    """Returns the layers of a sub-network from the one at `first` on, with its final norm and head, as a plain model.

    The model continues what the layers before have computed: it takes their hidden states as `inputs_embeds`, and does
    not scale them as embeddings. `first` is at least 1, and below the sub-network's depth. Everything else, and the
    errors, are those of `view`.
    """
    assert 0 < first < SubNet.parse(str(subnet)).depth
    return _viewed(model, subnet, space, first)


def _viewed(model: PreTrainedModel, subnet: SubNet | str, space: SubNetSpace | None, first: int = 0) -> PreTrainedModel:
    family = model.family if isinstance(model, NestedModel) else family_of(model.config.model_type)
    config = full_config(model) if isinstance(model, NestedModel) else model.config
    _check_kind(model, family)
    check_fits(subnet, family, config)
    order = _layer_order(model, family, config, space)
    hf_class = model.hf_class if isinstance(model, NestedModel) else type(model)
    cut = Cut(family, hf_class, config, SubNet.parse(str(subnet)), order, first)
    plain = cut.make(InMemory(model), model.dtype)
    plain.__dict__["num_copied_bytes"] = _copied_bytes(plain, model)
    copy_generation_config(model, plain)
    _dispatch(model, plain, cut)
    return plain


def keep_owned(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Gives a plain full network the tensors that other sub-networks own, by name and owner: `model.norm.weight@d4`."""
    setattr(model, OWNED, dict(tensors))


def _check_kind(model: PreTrainedModel, family: Family) -> None:
    """Raises UserError for a model whose weights are not those that the family names."""
    if getattr(model.config, "quantization_config", None) is not None:
        raise UserError("the model is quantised, so its weights cannot be cut. Load it without quantization_config.")
    try:
        model.get_submodule(family.layers), model.get_submodule(family.head)
    except AttributeError as error:
        raise UserError(
            f"a {type(model).__name__} has no {family.layers} or no {family.head}. Load the model with "
            f"{family.auto_class.__name__}."
        ) from error


def check_fits(subnet: SubNet | str, family: Family, config: PreTrainedConfig) -> None:
    """Raises UserError if a sub-network does not fit in the full network that has this config."""
    chosen, full = SubNet.parse(str(subnet)), family.full(config)
    if chosen.axes != full.axes or not chosen.is_within(full):
        raise UserError(f"{chosen} is not a part of {full}. Name sizes along the same axes, none of them larger.")
    family.check(SubNetSpace({chosen, full}), config)


def _layer_order(
    model: PreTrainedModel, family: Family, config: PreTrainedConfig, space: SubNetSpace | None
) -> Sequence[int]:
    """Returns the layer order along which depth counts. Raises: UserError if it is not known, or of another model."""
    full = family.full(config)
    if space is None and isinstance(model, NestedModel):
        space = model.space
    if space is not None and space.full != full:
        raise UserError(f"the space's largest sub-network is {space.full}, but the model is {full}.")
    order = list(range(full.depth)) if space is None else list(space.layer_order)
    if (stated := _stated_order(model)) and stated != order:
        raise UserError(
            f"the model was loaded from {model.name_or_path}, whose {SORTED_JSON} has another layer order. Give its "
            "space: view(model, name, space=...). sorted_ds.load(DIR) knows it."
        )
    return order


def _stated_order(model: PreTrainedModel) -> list[int] | None:
    """Returns the layer order in sorted.json of the directory that a model was loaded from, if there is one."""
    file = Path(model.name_or_path or "") / SORTED_JSON
    if isinstance(model, NestedModel) or not model.name_or_path or not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("layer_order")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is not a valid {SORTED_JSON} ({error}). Copy it again.") from error


class Weights(Protocol):
    """The tensors of a full network, by their Hugging Face names, with the owner for owned ones."""

    def __contains__(self, name: str) -> bool: ...

    def whole(self, name: str) -> Tensor:
        """Returns a tensor."""

    def first(self, name: str, shape: Sequence[int]) -> Tensor:
        """Returns the first part of a tensor along each of its dimensions."""


class InMemory:
    """The weights of a model. A part is a view."""

    def __init__(self, model: PreTrainedModel):
        """Raises: UserError if some are not in memory."""
        self.tensors = dict(_tensors_of(model))

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def whole(self, name: str) -> Tensor:
        return self.tensors[name]

    def first(self, name: str, shape: Sequence[int]) -> Tensor:
        return self.tensors[name][tuple(map(slice, shape))]


def _tensors_of(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
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


@dataclass(frozen=True)
class Cut:
    """Which part of a full network a sub-network is."""

    family: Family
    hf_class: type[PreTrainedModel]
    config: PreTrainedConfig
    """The full network's."""
    subnet: SubNet
    layer_order: Sequence[int]
    first: int = 0
    """The number of the sub-network's layers that are left out at the beginning. What is left takes hidden states."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the full network's layers that the model runs, ascending."""
        return tuple(sorted(self.layer_order[: self.subnet.depth]))[self.first :]

    def make(self, weights: Weights, dtype: torch.dtype, device: torch.device | None = None) -> PreTrainedModel:
        """Returns the sub-network as a plain model in evaluation mode, whose parameters take no gradient.

        Parameters are what `weights` gives, and so are buffers. With a `device`, buffers that `weights` does not have
        follow from the config and are computed there.
        """
        config = self.family.subnet_config(self.config, self.subnet, self.layers)
        if self.first:
            config = self.family.continued_config(config)
        with MAKING:
            plain = empty_model(self.hf_class, config, torch.empty(0, dtype=dtype, device="meta"))
        if device is not None:
            materialize_buffers(plain, device)
        halves = self.family.halves(self.config)
        tied = plain.all_tied_weights_keys or ()
        nested = tuple(f".{half.path}.{part.path}" for half in halves for part in half.parts)
        for path, module in plain.named_modules():
            prefix = f"{path}." if path else ""
            is_cut = path.startswith(f"{self.family.layers}.") and path.endswith(nested)
            for kind, parameter in module._parameters.items():
                if parameter is not None and prefix + kind not in tied:
                    name = self._stored(prefix + kind, weights)
                    part = weights.first(name, parameter.shape) if is_cut else weights.whole(name)
                    assert part.shape == parameter.shape, f"{name} has another shape than in the sub-network"
                    module._parameters[kind] = nn.Parameter(part, requires_grad=False)
            for kind, buffer in module._buffers.items():
                if buffer is not None and (name := self._stored(prefix + kind, weights)) in weights:
                    module._buffers[kind] = weights.whole(name)
        plain.tie_weights()
        return plain.eval()

    def name_in_full(self, name: str) -> str:
        """Returns the name that a tensor or module of the sub-network has in the full network."""
        prefix = f"{self.family.layers}."
        if not name.startswith(prefix):
            return name
        number, dot, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{self.layers[int(number)]}{dot}{rest}"

    def _stored(self, name: str, weights: Weights) -> str:
        """Returns the name of the tensor in `weights`, with its owner if the sub-network owns it.

        Raises: UserError if it does, and `weights` does not have it.
        """
        full = self.family.full(self.config)
        name = self.name_in_full(name)
        for axes in (axes for path, axes in self.family.owned.items() if name.rpartition(".")[0] == path):
            owner = self.subnet.name_along(axes)
            own = f"{name}{OWNER_SEPARATOR}{owner}"
            if own in weights:
                return own
            if owner != full.name_along(axes):
                raise UserError(
                    f"{own} is not in the model: {self.subnet} owns it. Load the family with sorted_ds.load."
                )
        return name


def _copied_bytes(plain: PreTrainedModel, model: PreTrainedModel) -> int:
    """Returns the bytes of the view's tensors that do not lie in the full network's memory."""
    tensors = (*model.parameters(), *model.buffers(), *getattr(model, OWNED, {}).values())
    shared = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    own = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in plain.parameters()}
    return sum(size for pointer, size in own.items() if pointer not in shared)


def _dispatch(model: PreTrainedModel, plain: PreTrainedModel, cut: Cut) -> None:
    """Lets a view of a model on several devices move its activations between them as the model does."""
    devices = getattr(model, "hf_device_map", None)
    if not devices or len(set(devices.values())) == 1:
        return
    from accelerate import dispatch_model

    paths = {cut.name_in_full(path): path for path, _ in plain.named_modules() if path}
    known = {paths[path]: device for path, device in devices.items() if path in paths}
    dispatch_model(plain, device_map=known, skip_keys=model._skip_keys_device_placement)
