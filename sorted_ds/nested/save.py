"""Writes the full network's Hugging Face directory from an iterator of weights, with one file at a time in memory.

In: a nested model, whose own parameters are not read, and an iterator of (parameter, value), which gathers under
ZeRO-3. Out: config.json, generation_config.json and safetensors, as `save_pretrained` would write them. If sub-networks
own tensors, `owned.safetensors` has the copies of all owners except the full network.
"""

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from sorted_ds.nested.nest import NestedModel, copy_generation_config, empty_model, full_config
from sorted_ds.nested.weights import all_slices, assembled

OWNED_FILE = "owned.safetensors"
"""The side file of owned tensors, with names like `model.norm.weight@d4`. It lacks the full network's copies."""
LARGEST_FILE = "5GB"
"""The size that the Hugging Face hub recommends."""


def save_full(
    model: NestedModel, weights: Iterable[tuple[str, Tensor]], folder: Path, largest_file: int | str = LARGEST_FILE
) -> None:
    """Writes the directory `folder`. `weights` yields all parameters in any order. Raises: OSError, SafetensorError."""
    slices = all_slices(model)
    like = torch.empty(0, dtype=model.dtype, device="meta")
    plain = empty_model(model.hf_class, full_config(model), like)
    copy_generation_config(model, plain)
    plain.save_pretrained(folder, state_dict={})  # writes only the configs
    add_older_names(folder)
    names = {part.key for part in slices.values()}  # a tied weight occurs once
    sizes = {name: tensor for name, tensor in plain.state_dict().items() if name in names}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=largest_file)
    waiting: dict[str, dict[str, Tensor]] = {file: {} for file in split.filename_to_tensors}
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in slices)
    owned: dict[str, Tensor] = {}
    for name, tensor in assembled(slices, chain(weights, buffers)):
        if name not in sizes:
            owned[name] = tensor.contiguous()
            continue
        file = split.tensor_to_filename[name]
        waiting[file][name] = tensor
        if len(waiting[file]) == len(split.filename_to_tensors[file]):
            save_file(waiting.pop(file), folder / file, metadata={"format": "pt"})
    assert not waiting, f"weights are missing for {', '.join(waiting)}"
    if owned:
        save_file(owned, folder / OWNED_FILE, metadata={"format": "pt"})
    if split.is_sharded:
        metadata = {"total_parameters": plain.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def add_older_names(folder: Path) -> None:
    """Adds to a directory's config.json the names under which transformers 4 reads what version 5 has renamed.

    Version 5 reads its own names and ignores these. Without them, 4.57 takes a `rope_theta` of 10,000.
    """
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text(encoding="utf-8"))
    config["torch_dtype"] = config["dtype"]
    if rope := config.get("rope_parameters"):
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_theta"] = rope["rope_theta"]
        config["rope_scaling"] = None if scaling == {"rope_type": "default"} else scaling
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
