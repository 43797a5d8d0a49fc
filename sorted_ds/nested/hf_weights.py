"""The weights of a Hugging Face directory: found, checked, fingerprinted, and read slice by slice.

In: a directory or a hub id. Out: its path, its fingerprint, and slices of the tensors in its safetensors.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sorted_ds.base.errors import UserError
from sorted_ds.nested.save import OWNED_FILE
from sorted_ds.nested.weights import Slice

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt"]
"""The files that are downloaded: weights, configs and tokenizers, but no pickles."""


class CheckpointReader:
    """Reads slices of the safetensors of a Hugging Face directory. A file is mapped anew for each slice.

    Mapping a file anew keeps its pages out of memory. An owned copy is read from the side file, or, if the side file
    lacks it, from the plain tensor.
    """

    def __init__(self, source: Path, shapes: Mapping[str, torch.Size]):
        """Raises: UserError if a tensor of `shapes` is missing or has another shape."""
        self.files: dict[str, Path] = {}
        found: dict[str, tuple] = {}
        for path in _all_files(source):
            file = _open_file(path)
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
        name = self._name(part)
        return part.of(_open_file(self.files[name]).get_slice(name))

    def read_buffer(self, part: Slice) -> Tensor:
        name = self._name(part)
        return _open_file(self.files[name]).get_tensor(name)

    def _name(self, part: Slice) -> str:
        return part.key if part.key in self.files else part.name


def fingerprint(source: Path) -> str:
    """Returns a hash of the names, shapes, dtypes and first rows of all tensors of a Hugging Face directory.

    Raises: UserError if a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in _all_files(source):
        file = _open_file(path)
        for name in sorted(file.keys()):
            tensor = file.get_slice(name)
            shape = tensor.get_shape()
            digest.update(f"{name} {shape} {tensor.get_dtype()} ".encode())
            first = tensor[:1] if shape else file.get_tensor(name)
            digest.update(first.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _all_files(source: Path) -> list[Path]:
    """Returns the safetensors of the full network, and the side file if there is one."""
    owned = source / OWNED_FILE
    return [*_weight_files(source), *([owned] if owned.is_file() else [])]


def _weight_files(source: Path) -> list[Path]:
    """Returns the shards in the index of a directory, or its single file of safetensors."""
    index = source / INDEX_FILE
    if index.is_file():
        try:
            return [source / shard for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is not an index of safetensors ({error!r}). Get the file again.") from error
    if (source / SINGLE_FILE).is_file():
        return [source / SINGLE_FILE]
    raise UserError(
        f"{source} holds neither {SINGLE_FILE} nor {INDEX_FILE}. Pickled weights (.bin) are not read: "
        "save the model with safetensors."
    )


def _open_file(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}). Get the file again.") from error


@cache
def _download(hub_id: str) -> Path:
    """Downloads from the hub, once a process for each id, and returns the directory."""
    return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))


def resolve_source(init: str) -> Path:
    """Returns a checkpoint's directory: `init` itself, or the downloaded files of the hub id `init`.

    Raises: UserError if `init` is neither a directory nor a hub id, or cannot be downloaded.
    """
    if Path(init).is_dir():
        if not (Path(init) / "config.json").is_file():
            raise UserError(f"{init} has no config.json. Name a Hugging Face model directory.")
        return Path(init)
    try:
        return _download(init)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{init!r} is not a directory and cannot be downloaded from the Hugging Face hub ({reason}). "
            "Name an existing directory or a hub id."
        ) from error
