"""The full network's Hugging Face config, from a run file or from a checkpoint.

In: a `Run` and the vocabulary of its tokenizer. Out: a config that the family accepts, or one error that says which
key it refuses.
"""

import difflib
from collections.abc import Mapping

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from sorted_ds.base.errors import UserError
from sorted_ds.data.text.tokenizer import Vocabulary
from sorted_ds.families.decoder import family_of
from sorted_ds.nested.load import resolve_source
from sorted_ds.run.config import SCRATCH, Run

ROTARY_KEYS = ("rope_theta", "rope_scaling")
"""Config keys that Hugging Face takes and keeps as `rope_parameters`."""


def model_config(run: Run, vocabulary: Vocabulary) -> PreTrainedConfig:
    """The full network's config: that of `model.init`, or of `model.family` with `model.config` filled in.

    Raises: UserError for an unknown family, a key that it does not have, or a value that it refuses.
    """
    config = _scratch_config(run, vocabulary) if run.model.init == SCRATCH else _checkpoint_config(run, vocabulary)
    config._attn_implementation = _attention(run, config)
    longest = getattr(config, "max_position_embeddings", run.batch.row_tokens)
    if run.batch.row_tokens > longest:
        raise UserError(
            f"batch.row_tokens = {run.batch.row_tokens}, but the model's max_position_embeddings is {longest}. "
            f"Raise that in model.config, or set row_tokens to {longest} at most."
        )
    return config


def _attention(run: Run, config: PreTrainedConfig) -> str:
    has_sdpa = getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_supports_sdpa", False)
    if run.model.attention == "sdpa" and not has_sdpa:
        raise UserError(
            f'model.attention = "sdpa", which {config.model_type} does not have. Set "eager", or remove it.'
        )
    return run.model.attention or ("sdpa" if has_sdpa else "eager")


def _checkpoint_config(run: Run, vocabulary: Vocabulary) -> PreTrainedConfig:
    """Its dropout is switched off: random masks would make a resumed run another one."""
    if run.model.family or run.model.config:
        raise UserError(
            f"model.init = {run.model.init!r} brings its own config. Remove model.family and model.config, "
            f'or set model.init = "{SCRATCH}".'
        )
    source = resolve_source(run.model.init)
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True)
    except (ValueError, TypeError, KeyError, OSError, StrictDataclassError) as error:
        raise UserError(f"{source / 'config.json'} cannot be used: {_first_line(error)}.") from error
    family_of(config.model_type)
    if vocabulary.size > config.vocab_size:
        raise UserError(
            f"data.tokenizer = {run.data.tokenizer!r} has {vocabulary.size} tokens, but {run.model.init} knows "
            f"{config.vocab_size}. Remove data.tokenizer to use the checkpoint's own."
        )
    for key in _dropout_keys(config.to_dict()):
        setattr(config, key, 0.0)
    return config


def _scratch_config(run: Run, vocabulary: Vocabulary) -> PreTrainedConfig:
    family_of(run.model.family)
    known = {*AutoConfig.for_model(run.model.family).to_dict(), *ROTARY_KEYS}
    for key in run.model.config:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            instead = f"Did you mean {near[0]!r}?" if near else "Remove it."
            raise UserError(f"model.config sets {key!r}, which {run.model.family}'s config does not have. {instead}")
    for key in _dropout_keys(run.model.config):
        raise UserError(
            f"model.config sets {key} = {run.model.config[key]}: dropout cannot be resumed exactly. Remove it."
        )
    derived = {
        "vocab_size": vocabulary.size,
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": vocabulary.eos_id,
        "pad_token_id": None,
        "use_cache": True,
    }
    try:
        config = AutoConfig.for_model(run.model.family, **{**derived, **run.model.config})
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, KeyError, ZeroDivisionError, RuntimeError, StrictDataclassError) as error:
        raise UserError(f"model.config is refused by {run.model.family}: {_first_line(error)}.") from error
    if vocabulary.size > config.vocab_size:
        raise UserError(
            f"model.config sets vocab_size = {config.vocab_size}, but the tokenizer has {vocabulary.size} tokens. "
            "Remove it from model.config: it follows from the tokenizer."
        )
    return config


def _dropout_keys(config: Mapping[str, object]) -> list[str]:
    return [key for key, value in config.items() if ("dropout" in key or key.endswith("pdrop")) and value]


def _first_line(error: Exception) -> str:
    """The reason: a strict dataclass of Hugging Face puts it on the last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return lines[-1 if isinstance(error, StrictDataclassError) else 0].rstrip(".")
