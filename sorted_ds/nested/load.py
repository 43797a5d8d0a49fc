"""Builds a nested model from a config or a checkpoint, without a plain model beside it.

In: a Hugging Face config, a space, and a seed or a directory of safetensors. Out: a nested model whose blocks are
adjacent in memory. The model is made on the meta device and nested there. Then each parameter gets memory and is filled
with its slice of a Hugging Face tensor, which the family's own initialisation made or which is read from a file. So
memory holds the model once, and one whole tensor more. If the caller passes `on_filled`, the weights of a layer half
lie in bundles (bundles.py), and memory holds one half, and what `on_filled` keeps of the others.
"""

import copy
import hashlib
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from sorted_ds.base.errors import naming
from sorted_ds.nested.blocks import NestedModule
from sorted_ds.nested.bundles import Contents, bundle, contents_of
from sorted_ds.nested.family import Family
from sorted_ds.nested.hf_weights import CheckpointReader
from sorted_ds.nested.nest import NestedModel, nest_as
from sorted_ds.nested.weights import Slice, buffers_of, slices_of
from sorted_ds.space import SubNetSpace

OnFilled = Callable[[nn.Parameter], None]
"""A function that is called with each filled parameter and may release the parameter's memory."""

HF_INITIALIZED = "_is_hf_initialized"
"""The attribute of tensors that Hugging Face's initialisation does not change."""


class WeightReader(Protocol):
    """An object that returns slices of Hugging Face tensors."""

    def read(self, part: Slice) -> Tensor:
        """Returns a slice of the tensor `part.name`, rows first. It may share memory with the whole tensor."""
        ...

    def read_buffer(self, part: Slice) -> Tensor | None:
        """Returns a persistent buffer, or None if the buffer keeps its initial value."""
        ...


def build(
    family: Family,
    config: PreTrainedConfig,
    space: SubNetSpace,
    source: Path | None,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    on_filled: OnFilled | None = None,
    heartbeat: Callable[[], None] = lambda: None,
) -> NestedModel:
    """Returns a nested model with the weights of the Hugging Face directory `source`, or from scratch if it is None.

    From scratch, the full network's weights depend only on the seed and on the name and shape of each tensor. They do
    not depend on the space's width steps, the dtype (they are rounded from fp32) or the device.

    With `on_filled`, weights lie in bundles. Parameters get memory, are filled and are passed to `on_filled` in the
    order of `named_parameters`, all parameters of a layer half together. `heartbeat` is called after each block.

    Raises: UserError for a space that does not fit the model, or for weights that are missing or have another shape.
    Both are found before the first parameter is filled.
    """
    model, modules = _unfilled(family, config, space, dtype)
    if on_filled is not None:
        bundle(model)
    reader = _ScratchReader(model, modules, seed) if source is None else _checkpoint_reader(source, model, modules)
    if on_filled is None:
        materialize(model, torch.device(device))
        _fill(model, reader, heartbeat)
    else:
        materialize_buffers(model, torch.device(device))
        _fill_one_by_one(model, reader, torch.device(device), on_filled, heartbeat)
    _fill_buffers(model, reader)
    if source is not None and (generation_config := generation_config_of(source)):
        model.generation_config = generation_config
    return model


def generation_config_of(source: Path) -> GenerationConfig | None:
    """Returns the generation config of a Hugging Face directory, if there is one. Raises: UserError if it is refused.

    transformers refuses some values only when the config is saved, so it is also checked as for saving.
    """
    file = source / "generation_config.json"
    if not file.is_file():
        return None
    with naming(file, "Correct the file, or remove it."):
        config = GenerationConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        config.validate(strict=True)
    return config


def check_weights(family: Family, config: PreTrainedConfig, space: SubNetSpace, source: Path) -> None:
    """Checks that the files of a Hugging Face directory hold what `build` will read, and nothing else.

    Only the headers of the weight files are read. Raises: UserError.
    """
    reader_of(family, config, space, source)
    generation_config_of(source)


def reader_of(family: Family, config: PreTrainedConfig, space: SubNetSpace, source: Path) -> CheckpointReader:
    """Returns the reader of a Hugging Face directory that holds what the full network needs, and nothing else.

    Only the headers of the weight files are read. Raises: UserError.
    """
    return _checkpoint_reader(source, *_unfilled(family, config, space, torch.float32))


def _unfilled(
    family: Family, config: PreTrainedConfig, space: SubNetSpace, dtype: torch.dtype
) -> tuple[NestedModel, dict[str, nn.Module]]:
    """Returns a nested model on the meta device, and the modules of a plain one there."""
    with torch.device("meta"):
        plain = family.auto_class.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False)
    modules = dict(copy.deepcopy(plain).named_modules())
    return nest_as(family, plain, space), modules


def _checkpoint_reader(source: Path, model: NestedModel, modules: Mapping[str, nn.Module]) -> CheckpointReader:
    plain: Any = modules[""]
    return CheckpointReader(source, _hf_shapes(model, modules), plain.all_tied_weights_keys)


def materialize(model: NestedModel, device: torch.device) -> None:
    """Gives a model on the meta device memory on `device`. The blocks of a layer share one buffer.

    Parameters stay unset. Buffers get their initial values from the family's own `_init_weights`, as in
    `from_pretrained`.
    """
    for module in list(model.modules()):
        if isinstance(module, NestedModule):
            _materialize_blocks(module, device)
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=device)))
    model.tie_weights()
    materialize_buffers(model, device)


def materialize_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Gives each buffer memory on `device` and its initial value, which follows from the config."""
    for module in model.modules():
        if buffers := dict(module.named_buffers(recurse=False)):
            for name, buffer in buffers.items():
                setattr(module, name, torch.empty_like(buffer, device=device))
            _initialize(model, module, keep_parameters=True)


def _materialize_blocks(layer: NestedModule, device: torch.device) -> None:
    for kind in ("weight", "bias"):
        like = getattr(layer.blocks[0], kind)
        if like is not None:
            rows = layer.bounds[-1][1]
            whole = torch.empty(rows, *like.shape[1:], dtype=like.dtype, device=device)
            for block, (start, stop) in zip(layer.blocks, layer.bounds, strict=True):
                setattr(block, kind, nn.Parameter(whole[start:stop]))


def _fill(model: NestedModel, reader: WeightReader, heartbeat: Callable[[], None]) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, part in slices_of(model).items():
            parameters[name].copy_(reader.read(part))
            heartbeat()


def _fill_buffers(model: NestedModel, reader: WeightReader) -> None:
    """Fills the persistent buffers that the reader has. From scratch all buffers keep their initial values."""
    buffers = dict(model.named_buffers())
    for name, part in buffers_of(model).items():
        if (value := reader.read_buffer(part)) is not None:
            buffers[name].copy_(value)


def _fill_one_by_one(
    model: NestedModel, reader: WeightReader, device: torch.device, on_filled: OnFilled, heartbeat: Callable[[], None]
) -> None:
    slices, contents = slices_of(model), contents_of(model)
    for _, group in groupby(contents, key=lambda name: name.partition(".bundles.")[0]):
        names = list(group)  # one parameter, or all bundles of a half
        if contents[names[0]].bundle is None:
            values = [reader.read(slices[names[0]])]
            heartbeat()
        else:
            values = [torch.empty_like(model.get_parameter(name), device=device).detach() for name in names]
            _fill_half(values, [contents[name] for name in names], slices, reader, heartbeat)
        for name in names:
            path, _, kind = name.rpartition(".")
            _set_parameter(model.get_submodule(path), kind, values.pop(0), device, on_filled)
    model.tie_weights()


def _fill_half(
    values: list[Tensor],
    contents: list[Contents],
    slices: Mapping[str, Slice],
    reader: WeightReader,
    heartbeat: Callable[[], None],
) -> None:
    """Fills all bundles of a half, one linear layer after the other, so that each linear layer is made once."""
    blocks = [value.view(-1).split(weights.numels) for value, weights in zip(values, contents, strict=True)]
    for number in range(len(blocks[0])):
        for bundle_blocks, weights in zip(blocks, contents, strict=True):
            read = reader.read(slices[weights.names[number]])
            bundle_blocks[number].view(read.shape).copy_(read)
            heartbeat()


def _set_parameter(module: nn.Module, kind: str, values: Tensor, device: torch.device, on_filled: OnFilled) -> None:
    """Makes `values` a parameter and passes it on. Values with the right dtype, device and layout are not copied."""
    parameter = nn.Parameter(values.to(device, getattr(module, kind).dtype).contiguous())
    setattr(module, kind, parameter)
    on_filled(parameter)


def _hf_shapes(model: NestedModel, modules: Mapping[str, nn.Module]) -> dict[str, torch.Size]:
    """Returns the shape of each Hugging Face tensor that is needed. `modules` are the plain model's."""
    names = (part.name for part in (*slices_of(model).values(), *buffers_of(model).values()))
    return {name: getattr(modules[name.rpartition(".")[0]], name.rpartition(".")[2]).shape for name in names}


class _ScratchReader:
    """Reads slices of newly initialised modules. Each module has its own random numbers and is made when it is read."""

    def __init__(self, model: NestedModel, modules: Mapping[str, nn.Module], seed: int):
        """Takes the plain model's `modules`, on the meta device."""
        self.model = model
        self.modules = modules
        self.seed = seed
        self.path = ""
        self.module = nn.Module()
        """The last module that was made. Its weight and bias, with all their blocks, are read one after the other."""

    def read(self, part: Slice) -> Tensor:
        path, _, kind = part.name.rpartition(".")
        if path != self.path:
            self.module = nn.Module()  # releases the last module before the next one is made
            self.path, self.module = path, self._make(path)
        return part.of(getattr(self.module, kind).detach())

    def read_buffer(self, part: Slice) -> None:
        return None

    def _make(self, path: str) -> nn.Module:
        module = copy.deepcopy(self.modules[path]).float().to_empty(device="cpu")
        digest = hashlib.sha256(f"{self.seed} {path}".encode()).digest()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))  # not CUDA's
            _initialize(self.model, module)
        return module


def _initialize(model: PreTrainedModel, module: nn.Module, keep_parameters: bool = False) -> None:
    """Calls Hugging Face's `_init_weights` on one module, for its buffers alone if `keep_parameters` is set."""
    marked = [p for p in module.parameters(recurse=False) if keep_parameters]
    for parameter in marked:
        setattr(parameter, HF_INITIALIZED, True)
    with torch.no_grad():
        model._init_weights(module)
    for parameter in marked:
        delattr(parameter, HF_INITIALIZED)
