"""The weights of a Hugging Face directory: found, checked, fingerprinted, and read slice by slice.

In: a directory or a hub id. Out: its path, its fingerprint, and slices of the tensors in its safetensors.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from sorted_ds.base.errors import UserError
from sorted_ds.base.names import CONFIG_JSON
from sorted_ds.nested.save import OWNED_FILE
from sorted_ds.nested.weights import OWNER_SEPARATOR, Slice

WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf")
"""Files of a directory that may hold weights."""
DTYPES = ("F64", "F32", "F16", "BF16")
"""The types of stored weights that are read, in the words of safetensors. Others are codes of a quantisation."""
HARMLESS = re.compile(r"(^|\.)rotary_emb\.inv_freq$|(^|\.)position_ids$")
"""Tensors that no model reads: older versions of transformers saved these buffers, which follow from the config."""
NUM_NAMED = 3
"""How many names of files or tensors a message lists."""
LICENSE_WORDS = ("license", "licence", "copying", "copyright", "notice", "terms", "policy")
"""What is, in any case, in the names of files that hold a license (deploy/license.py)."""
HUB_FILES = [
    *("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.md", "*.rst", "*.pdf", "*.html"),
    *(f"*{''.join(f'[{letter.upper()}{letter}]' for letter in word)}*" for word in LICENSE_WORDS),
]
"""The files that are downloaded: weights, configs, tokenizers, the card and licenses, but no pickles.

A card may name any text file as its license. The hub's patterns distinguish upper and lower case."""


class CheckpointReader:
    """Reads slices of the safetensors of a Hugging Face directory. A file is mapped anew for each slice.

    Mapping a file anew keeps its pages out of memory. An owned copy is read from the side file, or, if the side file
    lacks it, from the plain tensor.
    """

    def __init__(self, source: Path, shapes: Mapping[str, torch.Size], tied: Mapping[str, str] | None = None):
        """Opens the header of each file.

        `tied`: for each tensor that shares its values with another one, the name of the other.

        Raises: UserError if a tensor of `shapes` is missing or has another shape, if weights are quantised, or if the
        files hold a tensor that nothing reads.
        """
        self.files: dict[str, Path] = {}
        found: dict[str, tuple] = {}
        for path in _all_files(source):
            file = _open_file(path)
            names = list(file.keys())
            if path.name == OWNED_FILE and (plain := [name for name in names if OWNER_SEPARATOR not in name]):
                raise UserError(f"{path} holds {_some(plain)}, which belongs to no sub-network. Copy the model again.")
            self.files |= dict.fromkeys(names, path)
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
            self._check_dtypes(path, {name: file.get_slice(name).get_dtype() for name in names if name in shapes})
        self._check_tied(source, tied or {})
        self._check_unread(source, {*shapes, *(tied or {})})
        for name, shape in shapes.items():
            if name not in found:
                raise UserError(f"{source} holds no tensor {name!r}. Its weights do not belong to its config.")
            if found[name] != tuple(shape):
                raise UserError(
                    f"{source}: {name} has shape {found[name]}, but the config says {tuple(shape)}. "
                    "Its weights do not belong to its config."
                )

    def _check_dtypes(self, path: Path, dtypes: Mapping[str, str]) -> None:
        for name, dtype in dtypes.items():
            if dtype not in DTYPES:
                raise UserError(
                    f"{path}: {name} is stored as {dtype}, so the checkpoint is quantised. Name the checkpoint that it "
                    "was made from, or save a dequantised copy of it."
                )

    def _check_tied(self, source: Path, tied: Mapping[str, str]) -> None:
        for name, other in tied.items():
            if name in self.files and other in self.files and not torch.equal(self._whole(name), self._whole(other)):
                raise UserError(
                    f"{source}: config.json says that {name} is {other} (tie_word_embeddings), but the file holds "
                    f"another {name}. Set tie_word_embeddings to false in config.json to keep it, or remove it from "
                    "the file."
                )

    def _check_unread(self, source: Path, read: Collection[str]) -> None:
        unread = [
            name
            for name, path in self.files.items()
            if name not in read and path.name != OWNED_FILE and not HARMLESS.search(name)
        ]
        if unread and (alike := _named_alike(unread, read)):
            raise UserError(
                f"{source} names its tensors like {alike[0]}, where transformers writes {alike[1]}. Load the model as "
                "it was saved, and save it with transformers' save_pretrained."
            )
        if unread:
            raise UserError(
                f"{source} holds {_some(unread)}, which a model of its config.json does not have. Its weights do not "
                "belong to its config. Correct config.json, or name another checkpoint."
            )

    def _whole(self, name: str) -> Tensor:
        return _open_file(self.files[name]).get_tensor(name)

    def read(self, part: Slice) -> Tensor:
        """Returns a slice. Raises: UserError when it holds a number that is not finite."""
        name = self._name(part)
        return self._finite(name, part.of(_open_file(self.files[name]).get_slice(name)))

    def first(self, name: str, shape: Sequence[int]) -> Tensor:
        """Returns the first part of a tensor along each of its dimensions, and reads only its ranges of the file.

        Raises: UserError when it holds a number that is not finite.
        """
        return self._finite(name, _open_file(self.files[name]).get_slice(name)[tuple(map(slice, shape))])

    def whole(self, name: str) -> Tensor:
        """Returns a tensor. Raises: UserError when it holds a number that is not finite."""
        return self._finite(name, self._whole(name))

    def _finite(self, name: str, value: Tensor) -> Tensor:
        if value.is_floating_point() and value.numel() and not all(torch.isfinite(end) for end in torch.aminmax(value)):
            raise UserError(
                f"{self.files[name]}: {name} holds a number that is not finite. Copy the file again, or name another "
                "checkpoint."
            )
        return value

    def read_buffer(self, part: Slice) -> Tensor:
        return self._whole(self._name(part))

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
    """Returns the files of the full network's weights: those that transformers takes."""
    entry = _weight_entry(source)
    if not entry.name.endswith(".json"):
        return [entry]
    try:
        return [source / shard for shard in sorted(set(json.loads(entry.read_text())["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{entry} is not an index of safetensors ({error!r}). Get the file again.") from error


def _weight_entry(source: Path) -> Path:
    """Returns the single file of weights, or the index of several.

    transformers takes the file that the config names, or else the single file before the index.
    """
    if named := _named_in_config(source):
        if (source / named).is_file():
            return source / named
        raise UserError(f"{source} holds no {named}, which {CONFIG_NAME} names in transformers_weights. Get the file.")
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        if (source / name).is_file():
            return source / name
    raise UserError(
        f"{source} holds neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}. Pickled weights (.bin) are not "
        "read: save the model with safetensors."
    )


def _named_in_config(source: Path) -> str:
    """Returns the name of the file of weights that the config gives, or an empty string."""
    try:
        config = json.loads((source / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""  # whoever reads the config says what is wrong with it
    name = config.get("transformers_weights") if isinstance(config, dict) else None
    return name if isinstance(name, str) else ""


def unread_weight_files(source: Path) -> list[str]:
    """Returns the names of files that may hold weights, and are not read because other files come first."""
    read = {_weight_entry(source).name, *(path.name for path in _all_files(source))}
    return sorted({path.name for pattern in WEIGHT_PATTERNS for path in source.glob(pattern)} - read)


def _named_alike(unread: Sequence[str], read: Collection[str]) -> tuple[str, str] | None:
    """Returns an unread name and one that is read, of which one is the other with a prefix, if all names are so."""
    own = unread[0]
    for expected in read:
        if own.endswith(f".{expected}") or expected.endswith(f".{own}"):
            longer, shorter = max(own, expected, key=len), min(own, expected, key=len)
            prefix = longer[: -len(shorter)]
            names = {name.removeprefix(prefix) if longer == own else prefix + name for name in unread}
            return (own, expected) if names <= set(read) else None
    return None


def _some(names: Sequence[str]) -> str:
    """Returns the first names, and how many more there are."""
    more = f" and {len(names) - NUM_NAMED} more tensors" if len(names) > NUM_NAMED else ""
    return ", ".join(names[:NUM_NAMED]) + more


def _open_file(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}). Get the file again.") from error


_snapshots: dict[str, Path] = {}
"""The directories of the hub ids that this process has asked for."""


def _snapshot(hub_id: str, asks_hub: bool) -> Path:
    if hub_id not in _snapshots:
        found = snapshot_download(hub_id, allow_patterns=HUB_FILES, local_files_only=not asks_hub)
        _snapshots[hub_id] = Path(found)
    return _snapshots[hub_id]


def resolve_source(init: str, asks_hub: bool = True) -> Path:
    """Returns a checkpoint's directory: `init` itself, or the downloaded files of the hub id `init`.

    Without `asks_hub` the files must have been downloaded to this host before. A process asks once for each id.

    Raises: UserError if `init` is neither a directory nor a hub id, or cannot be downloaded.
    """
    if Path(init).is_dir():
        if not (Path(init) / CONFIG_JSON).is_file():
            raise UserError(f"{init} has no config.json. Name a Hugging Face model directory.")
        return Path(init)
    try:
        return _snapshot(init, asks_hub)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{init!r} is not a directory and cannot be downloaded from the Hugging Face hub ({reason}). "
            "Name an existing directory or a hub id."
        ) from error
