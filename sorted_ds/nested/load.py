"""Builds a nested model from a config or a checkpoint, without a plain model beside it.

In: a Hugging Face config, a space, and a seed or a directory of safetensors. Out: a nested model whose blocks lie side
by side in memory. The model is made on the meta device and nested there; then each parameter gets memory and is filled
with its slice of a Hugging Face tensor, active from the family's own initialisation or read from the file. So memory
holds the model once, and one whole tensor more. Where the caller takes each parameter over as soon as it is filled, the
weights of a layer half are one parameter for each width step (bundles.py), and memory holds, instead of the model, what
the caller keeps of it and one half.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig

from sorted_ds.base.errors import UserError
from sorted_ds.nested.blocks import NestedModule
from sorted_ds.nested.bundles import Parts, bundle, parts_of
from sorted_ds.nested.family import Family
from sorted_ds.nested.nest import NestedModel, nest_as
from sorted_ds.nested.save import OWNED_FILE
from sorted_ds.nested.weights import Slice, buffers_of, slices_of
from sorted_ds.space import SubNetSpace

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt"]
"""Weights, configs and tokenizers. No pickles."""

Take = Callable[[nn.Parameter], None]
"""Gets a filled parameter, and may release its memory."""

HF_MARK = "_is_hf_initialized"
"""Attribute of a tensor that Hugging Face's initialisers leave alone."""


class WeightSource(Protocol):
    """Where Hugging Face tensors come from."""

    def read(self, part: Slice) -> Tensor:
        """A slice of the tensor `part.name`, rows first. May share memory with the whole tensor."""
        ...

    def read_buffer(self, part: Slice) -> Tensor | None:
        """A persistent buffer, or None where the source leaves it as it was initialised."""
        ...


def build(
    family: Family,
    config: PreTrainedConfig,
    space: SubNetSpace,
    source: Path | None,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    take: Take | None = None,
    heartbeat: Callable[[], None] = lambda: None,
) -> NestedModel:
    """A nested model from scratch (`source` None), or with the weights of a Hugging Face directory.

    From scratch, the full network's weights depend on the seed, the tensor's name and its shape alone: not on the
    space's width steps, the dtype (they are rounded from fp32) or the device. With `take` weights are in bundles, and
    parameters get memory and are handed over in the order of `named_parameters`: those of a layer half, or one.
    `heartbeat` is called after each block.

    Raises: UserError for a space that does not fit, or weights that are missing or misshapen, before
    the first parameter is filled.
    """
    config = copy.deepcopy(config)
    with torch.device("meta"):
        plain = family.auto_class.from_config(config, dtype=dtype)
    modules = dict(copy.deepcopy(plain).named_modules())  # these stay on the meta device
    model = nest_as(family, plain, space)
    if take is not None:
        bundle(model)
    weights = _Scratch(model, modules, seed) if source is None else _Checkpoint(source, _hf_shapes(model, modules))
    if take is None:
        materialize(model, torch.device(device))
        _fill(model, weights, heartbeat)
    else:
        _materialize_buffers(model, torch.device(device))
        _fill_one_by_one(model, weights, torch.device(device), take, heartbeat)
    _fill_buffers(model, weights)
    if source is not None and (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model


def materialize(model: NestedModel, device: torch.device) -> None:
    """Gives a meta-device model memory: parameters unset, the blocks of a layer in one buffer; buffers as they start.

    Buffers are computed by the family's own `_init_weights`, as in `from_pretrained`.
    """
    for module in list(model.modules()):
        if isinstance(module, NestedModule):
            _materialize_blocks(module, device)
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=device)))
    model.tie_weights()
    _materialize_buffers(model, device)


def _materialize_buffers(model: NestedModel, device: torch.device) -> None:
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


def _fill(model: NestedModel, weights: WeightSource, heartbeat: Callable[[], None]) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, part in slices_of(model).items():
            parameters[name].copy_(weights.read(part))
            heartbeat()


def _fill_buffers(model: NestedModel, weights: WeightSource) -> None:
    """Persistent buffers that the source has. From scratch they stay as the family's initialisation made them."""
    buffers = dict(model.named_buffers())
    for name, part in buffers_of(model).items():
        if (value := weights.read_buffer(part)) is not None:
            buffers[name].copy_(value)


def _fill_one_by_one(
    model: NestedModel, weights: WeightSource, device: torch.device, take: Take, heartbeat: Callable[[], None]
) -> None:
    slices, parts = slices_of(model), parts_of(model)
    for _, own in groupby(parts, key=lambda name: name.partition(".bundles.")[0]):
        names = list(own)  # a parameter, or all bundles of a half
        if parts[names[0]].bundle is None:
            values = [weights.read(slices[names[0]])]
            heartbeat()
        else:
            values = [torch.empty_like(model.get_parameter(name), device=device).detach() for name in names]
            _fill_half(values, [parts[name] for name in names], slices, weights, heartbeat)
        for name in names:
            path, _, kind = name.rpartition(".")
            _hand_over(model.get_submodule(path), kind, values.pop(0), device, take)
    model.tie_weights()


def _fill_half(
    values: list[Tensor],
    parts: list[Parts],
    slices: Mapping[str, Slice],
    weights: WeightSource,
    heartbeat: Callable[[], None],
) -> None:
    """All bundles together, one linear layer after the other, so that each of these is made once."""
    blocks = [value.view(-1).split(own.sizes) for value, own in zip(values, parts, strict=True)]
    for number in range(len(blocks[0])):
        for of_bundle, own in zip(blocks, parts, strict=True):
            read = weights.read(slices[own.names[number]])
            of_bundle[number].view(read.shape).copy_(read)
            heartbeat()


def _hand_over(module: nn.Module, kind: str, values: Tensor, device: torch.device, take: Take) -> None:
    """Copies nothing where the values have the parameter's dtype, device and layout already."""
    parameter = nn.Parameter(values.to(device, getattr(module, kind).dtype).contiguous())
    setattr(module, kind, parameter)
    take(parameter)


def _hf_shapes(model: NestedModel, modules: Mapping[str, nn.Module]) -> dict[str, torch.Size]:
    """The shape of each Hugging Face tensor that is needed; `modules` are the plain model's."""
    paths = (part.name.rpartition(".") for part in (*slices_of(model).values(), *buffers_of(model).values()))
    return {f"{path}.{kind}": getattr(modules[path], kind).shape for path, _, kind in paths}


class _Scratch:
    """The family's own initialisation, one module at a time, each from its own random numbers."""

    def __init__(self, model: NestedModel, modules: Mapping[str, nn.Module], seed: int):
        """`modules` are the plain model's, on the meta device."""
        self.model = model
        self.modules = modules
        self.seed = seed
        self.path = ""
        self.module = nn.Module()
        """The module made last: its weight and bias, and all blocks of them, are asked for one after the other."""

    def read(self, part: Slice) -> Tensor:
        path, _, kind = part.name.rpartition(".")
        if path != self.path:
            self.module = nn.Module()  # released before the next is made
            self.path, self.module = path, self._made(path)
        return part.of(getattr(self.module, kind).detach())

    def read_buffer(self, part: Slice) -> None:
        return None

    def _made(self, path: str) -> nn.Module:
        module = copy.deepcopy(self.modules[path]).float().to_empty(device="cpu")
        digest = hashlib.sha256(f"{self.seed} {path}".encode()).digest()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))  # not CUDA's
            _initialize(self.model, module)
        return module


def _initialize(model: NestedModel, module: nn.Module, keep_parameters: bool = False) -> None:
    """Hugging Face's `_init_weights`, which leaves alone what carries its mark."""
    marked = [p for p in module.parameters(recurse=False) if keep_parameters]
    for parameter in marked:
        setattr(parameter, HF_MARK, True)
    with torch.no_grad():
        model._init_weights(module)
    for parameter in marked:
        delattr(parameter, HF_MARK)


class _Checkpoint:
    """Slices of the safetensors of a Hugging Face directory. A file is mapped for one slice, so its pages do not stay.

    A copy that a sub-network owns is read from the side file; where that has none, the plain tensor is its first value.

    Raises, when it is made: UserError for a tensor of `shapes` that is missing or has another shape.
    """

    def __init__(self, source: Path, shapes: Mapping[str, torch.Size]):
        self.files: dict[str, Path] = {}
        found: dict[str, tuple] = {}
        for path in _all_files(source):
            file = _opened(path)
            names = list(file.keys())
            self.files |= dict.fromkeys(names, path)
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
        for name, shape in shapes.items():
            if name not in found:
                raise UserError(f"{source} holds no tensor {name!r}. Its weights do not belong to its config.")
            if found[name] != tuple(shape):
                raise UserError(
                    f"{source}: {name} has shape {found[name]}, but the config says {tuple(shape)}. "
                    "Its weights do not belong to its config."
                )

    def read(self, part: Slice) -> Tensor:
        name = part.key if part.key in self.files else part.name
        return part.of(_opened(self.files[name]).get_slice(name))

    def read_buffer(self, part: Slice) -> Tensor:
        name = part.key if part.key in self.files else part.name
        return _opened(self.files[name]).get_tensor(name)


def fingerprint(source: Path) -> str:
    """Of the weights of a Hugging Face directory: names, shapes, dtypes and each tensor's first row.

    Raises: UserError when they cannot be read.
    """
    digest = hashlib.sha256()
    for path in _all_files(source):
        file = _opened(path)
        for name in sorted(file.keys()):
            tensor = file.get_slice(name)
            shape = tensor.get_shape()
            digest.update(f"{name} {shape} {tensor.get_dtype()} ".encode())
            first = tensor[:1] if shape else file.get_tensor(name)
            digest.update(first.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _all_files(source: Path) -> list[Path]:
    """The safetensors of the full network, and the side file, if there is one."""
    owned = source / OWNED_FILE
    return [*_weight_files(source), *([owned] if owned.is_file() else [])]


def _weight_files(source: Path) -> list[Path]:
    """The safetensors of a directory: the shards of its index, or the one file."""
    index = source / INDEX_FILE
    if index.is_file():
        try:
            return [source / shard for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is no index of safetensors ({error!r}). Get the file again.") from error
    if (source / SINGLE_FILE).is_file():
        return [source / SINGLE_FILE]
    raise UserError(
        f"{source} holds neither {SINGLE_FILE} nor {INDEX_FILE}. Pickled weights (.bin) are not read: "
        "save the model with safetensors."
    )


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}). Get the file again.") from error


@cache
def _downloaded(hub_id: str) -> Path:
    """Asks the hub once a process, however often the source is resolved."""
    return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))


def resolve_source(init: str) -> Path:
    """The directory of a checkpoint: `init` itself, or the download of a hub id (safetensors, configs, tokenizer).

    Raises: UserError when it is neither, or cannot be downloaded.
    """
    if Path(init).is_dir():
        if not (Path(init) / "config.json").is_file():
            raise UserError(f"{init} has no config.json. Name a Hugging Face model directory.")
        return Path(init)
    try:
        return _downloaded(init)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{init!r} is no directory and could not be had from the Hugging Face hub ({reason}). "
            "Name an existing directory or a hub id."
        ) from error
