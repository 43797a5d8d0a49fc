"""Reads the full network's Hugging Face config from a run file or from a checkpoint.

In: a `Run`. Out: a config that the family and the task accept, or one error that says which key is refused.
"""

import copy
import difflib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from sorted_ds.base.errors import UserError, naming, reason_of
from sorted_ds.base.names import CONFIG_JSON
from sorted_ds.deploy.model_dir import SORTED_JSON
from sorted_ds.families import family_of
from sorted_ds.nested.hf_weights import fingerprint, resolve_source
from sorted_ds.run.config import SCRATCH, Run
from sorted_ds.tasks import Task, task_of

SORTED_FOLDER = "sorted"
"""The folder of RUN_DIR that holds the sorted model of `model.sort`."""
SORTED_FROM = "sorted_from"
"""The key of a sorted model's sorted.json that holds the fingerprint of the weights before sorting."""
ROTARY_KEYS = ("rope_theta", "rope_scaling")
"""Hugging Face accepts these config keys, and stores their values in `rope_parameters`."""


def model_config(run: Run) -> PreTrainedConfig:
    """Returns the config of `model.init`, or the config of `model.family` with the values of `model.config`.

    Raises: UserError for an unknown family, and for a key or a value that the family does not accept.
    """
    task = task_of(run.task)
    if run.model.sort and run.model.init == SCRATCH:
        raise UserError(f'model.sort = true, but model.init = "{SCRATCH}" has random weights. Remove model.sort.')
    config = _scratch_config(run, task) if run.model.init == SCRATCH else _checkpoint_config(run)
    task.check_config(run, config)
    config._attn_implementation = attention_of(config, run.model.attention)
    return config


def source_of(run: Run, asks_hub: bool = True) -> Path | None:
    """Returns the folder of the first weights on this host, after a download if needed; None for random weights.

    With `model.sort` that is RUN_DIR/sorted, once it is there. Without `asks_hub` another process of this host must
    have downloaded them. Raises: UserError when they cannot be found.
    """
    if run.model.init == SCRATCH:
        return None
    return sorted_source(run) or resolve_source(run.model.init, asks_hub)


def sorted_source(run: Run) -> Path | None:
    """Returns the folder of the sorted model of `model.sort`; None if it is not wanted, or not made yet.

    A run that branches off takes that of the run that it comes from.
    """
    if not run.model.sort:
        return None
    origin = run.checkpoint.branch.rpartition("@")[0]
    folders = (run_dir / SORTED_FOLDER for run_dir in (run.run_dir, *([Path(origin)] if origin else [])))
    return next(filter(Path.is_dir, folders), None)


def require_sorted(run: Run) -> None:
    """Raises UserError if `model.sort` is set and the model is not sorted yet, or another one is.

    While one rank sorted it, others would time out.
    """
    if not run.model.sort:
        return
    folder, source = sorted_source(run), resolve_source(run.model.init, asks_hub=False)
    if folder is None:
        raise UserError(
            f"model.sort = true, but {run.run_dir / SORTED_FOLDER} is not there. Run `sorted-ds prepare` with this run "
            "file first."
        )
    if _facts_of(folder).get(SORTED_FROM) != fingerprint(source):
        raise UserError(
            f"{folder} was not made from the weights of model.init = {run.model.init}. Set another run_dir, or delete "
            "the folder if the run has not begun."
        )


def _facts_of(folder: Path) -> dict[str, Any]:
    """Returns what sorted.json of a sorted model says; nothing if it cannot be read."""
    with suppress(OSError, ValueError):
        return json.loads((folder / SORTED_JSON).read_text(encoding="utf-8"))
    return {}


def layer_order_of(run: Run) -> list[int]:
    """Returns the layer order of the run file, or of the model's sorted.json. Empty for the network's own.

    Before `model.sort` has found the order, it is the network's own.

    Raises: UserError if the model has none.
    """
    if run.space.layer_order != "model":
        return list(run.space.layer_order)
    if run.model.sort and not sorted_source(run):
        return []
    source = source_of(run)
    if source is None:
        raise UserError(
            f'space.layer_order = "model", but model.init = "{SCRATCH}". Name the layers, or in model.init a directory '
            "that `sorted-ds sort` has written."
        )
    path = source / SORTED_JSON
    try:
        order = json.loads(path.read_text(encoding="utf-8"))["layer_order"]
        return [int(number) for number in order or ()]  # a family that was trained without an order has null
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'space.layer_order = "model", but {path} has no layer order. Set model.sort = true, or name the layers.'
        ) from error


def json_of_config(config: PreTrainedConfig) -> str:
    """Returns a config as JSON, for other ranks."""
    return config.to_json_string(use_diff=False)


def config_of_json(run: Run, text: str) -> PreTrainedConfig:
    """Returns the config that `json_of_config` has written."""
    fields = json.loads(text)
    config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    config._attn_implementation = attention_of(config, run.model.attention)
    return config


def attention_of(config: PreTrainedConfig, wanted: str = "") -> str:
    """Returns the attention implementation that is wanted, or the family's best one.

    Raises: UserError if the family does not have the one that is wanted.
    """
    model_class = family_of(config.model_type).auto_class._model_mapping[type(config)]
    has_sdpa = getattr(model_class, "_supports_sdpa", False)
    if wanted == "sdpa" and not has_sdpa:
        raise UserError(
            f'model.attention = "sdpa", but {config.model_type} has no such attention. Set "eager", or remove the key.'
        )
    return wanted or ("sdpa" if has_sdpa else "eager")


def _checkpoint_config(run: Run) -> PreTrainedConfig:
    if not run.model.init:
        raise UserError(f'model.init is empty. Name a directory, a hub id, or "{SCRATCH}".')
    if run.model.family or run.model.config:
        raise UserError(
            f"model.init = {run.model.init!r} is a checkpoint, which has its own config. Remove model.family and "
            f'model.config, or set model.init = "{SCRATCH}".'
        )
    source = source_of(run)
    assert source is not None
    return checkpoint_config(source, "model.init")


def checkpoint_config(source: Path, key: str) -> PreTrainedConfig:
    """Returns a checkpoint's config without dropout, because a resumed run could not repeat the random masks.

    `key`: the key of the run file that names the checkpoint. Raises: UserError when the config cannot be used.
    """
    file, advice = source / CONFIG_JSON, f"Correct the file, or name another checkpoint in {key}."
    with naming(file, advice):
        config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    family = family_of(config.model_type)
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"{file} has a quantization_config, so the weights are codes. Set {key} to the checkpoint that it was "
            "made from, or save a dequantised copy without this key."
        )
    with naming(file, advice), torch.device("meta"):
        family.auto_class.from_config(copy.deepcopy(config), trust_remote_code=False)
    for key in _dropout_keys(config.to_dict()):
        setattr(config, key, 0.0)
    return config


def _scratch_config(run: Run, task: Task) -> PreTrainedConfig:
    family = family_of(run.model.family)
    known_keys = {*AutoConfig.for_model(run.model.family).to_dict(), *ROTARY_KEYS}
    for key in run.model.config:
        if key not in known_keys:
            near = difflib.get_close_matches(key, known_keys, n=1)
            instead = f"Did you mean {near[0]!r}?" if near else "Remove it."
            raise UserError(f"model.config sets {key!r}, which {run.model.family}'s config does not have. {instead}")
    for key in _dropout_keys(run.model.config):
        raise UserError(
            f"model.config sets {key} = {run.model.config[key]}, but a run with dropout cannot be resumed exactly. "
            f"Remove {key}."
        )
    fields = {**task.config_fields(run), **run.model.config}
    try:
        config = AutoConfig.for_model(run.model.family, **fields)
        with torch.device("meta"):
            family.auto_class.from_config(config, trust_remote_code=False)
    except Exception as error:  # the library raises many types, down to AssertionError
        raise UserError(
            f"model.config is refused by {run.model.family}: {reason_of(error)}. Correct the value in model.config."
        ) from error
    return config


def _dropout_keys(config: Mapping[str, object]) -> list[str]:
    return [key for key, value in config.items() if ("dropout" in key or key.endswith("pdrop")) and value]
