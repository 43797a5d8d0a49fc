"""Reads the full network's Hugging Face config from a run file or from a checkpoint.

In: a `Run`. Out: a config that the family and the task accept, or one error that says which key is refused.
"""

import difflib
from collections.abc import Mapping

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from sorted_ds.base.errors import UserError
from sorted_ds.families import family_of
from sorted_ds.nested.hf_weights import resolve_source
from sorted_ds.run.config import SCRATCH, Run
from sorted_ds.tasks import Task, task_of

ROTARY_KEYS = ("rope_theta", "rope_scaling")
"""Hugging Face accepts these config keys, and stores their values in `rope_parameters`."""


def model_config(run: Run) -> PreTrainedConfig:
    """Returns the config of `model.init`, or the config of `model.family` with the values of `model.config`.

    Raises: UserError for an unknown family, and for a key or a value that the family does not accept.
    """
    task = task_of(run.task)
    config = _scratch_config(run, task) if run.model.init == SCRATCH else _checkpoint_config(run)
    task.check_config(run, config)
    config._attn_implementation = _attention(run, config)
    return config


def _attention(run: Run, config: PreTrainedConfig) -> str:
    model_class = family_of(config.model_type).auto_class._model_mapping[type(config)]
    has_sdpa = getattr(model_class, "_supports_sdpa", False)
    if run.model.attention == "sdpa" and not has_sdpa:
        raise UserError(
            f'model.attention = "sdpa", but {config.model_type} has no such attention. Set "eager", or remove the key.'
        )
    return run.model.attention or ("sdpa" if has_sdpa else "eager")


def _checkpoint_config(run: Run) -> PreTrainedConfig:
    """Returns the checkpoint's config without dropout, because a resumed run could not repeat the random masks."""
    if run.model.family or run.model.config:
        raise UserError(
            f"model.init = {run.model.init!r} is a checkpoint, which has its own config. Remove model.family and "
            f'model.config, or set model.init = "{SCRATCH}".'
        )
    source = resolve_source(run.model.init)
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, OSError, StrictDataclassError) as error:
        raise UserError(
            f"{source / 'config.json'} cannot be used: {_reason(error)}. Name another checkpoint in model.init."
        ) from error
    family_of(config.model_type)
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
            family.auto_class.from_config(config)
    except (ValueError, TypeError, KeyError, ZeroDivisionError, RuntimeError, StrictDataclassError) as error:
        raise UserError(
            f"model.config is refused by {run.model.family}: {_reason(error)}. Correct the value in model.config."
        ) from error
    return config


def _dropout_keys(config: Mapping[str, object]) -> list[str]:
    return [key for key, value in config.items() if ("dropout" in key or key.endswith("pdrop")) and value]


def _reason(error: Exception) -> str:
    """Returns the line of the message that states the reason: the last one of a strict dataclass, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return lines[-1 if isinstance(error, StrictDataclassError) else 0].rstrip(".")
