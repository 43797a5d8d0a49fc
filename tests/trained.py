"""A run's directory as training leaves it: a tiny random llama, its tokenizer, sorted.json. Nothing is trained."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from sorted_ds.deploy.family import load
from sorted_ds.deploy.model_dir import Measured, ModelDir, Sorted
from sorted_ds.families import family_of
from sorted_ds.nested import NestedModel, costs_of, sorted_by_cost
from sorted_ds.nested.load import build
from tests.batches import LLAMA
from tests.families import SPACE, tiny_config, tiny_model

ROW_TOKENS = 16
BASELINE = {"unigram model": 4.5}


def tokenizer() -> PreTrainedTokenizerFast:
    """One id for each ASCII character; 128 for everything else, 129 at the end."""
    vocabulary = {chr(n): n for n in range(128)} | {"<unk>": 128, "<eos>": 129}
    plain = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    plain.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="<eos>")


def trained_run(
    folder: Path,
    variant: str = "llama",
    dtype: torch.dtype = torch.float32,
    tokens_dir: str = "",
    layer_order: tuple[int, ...] | None = None,
    **changes,
) -> Path:
    """RUN_DIR with model/ and no measurements. Without a layer order sorted.json says as little as an earlier one."""
    tiny_model(variant, **changes).to(dtype).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    config = tiny_config(variant)
    space = sorted_by_cost(SPACE, family_of(config.model_type), config)
    names = tuple(subnet.name for subnet in space)
    data: dict[str, object] = {"tokens_dir": tokens_dir}
    contents = Sorted(names, data, row_tokens=ROW_TOKENS, eval_rows=8, layer_order=layer_order)
    ModelDir(folder, folder / "model").write(contents)
    return folder


def load_nested(folder: Path, dtype: torch.dtype | None = None) -> NestedModel:
    """The nested model of a run's directory."""
    family = load(folder, dtype=dtype)
    source = family.where.model
    return build(family.architecture, family.config, family.space, source, seed=0, dtype=family.dtype).eval()


def measured_run(folder: Path, **kwargs) -> Path:
    """RUN_DIR with a made-up table: the loss falls with the parameters."""
    ModelDir.find(trained_run(folder, **kwargs)).add_measured(made_up_table(), BASELINE)
    return folder


def made_up_table() -> list[Measured]:
    costs = costs_of(SPACE, LLAMA, tiny_config("llama"), ROW_TOKENS)
    return [
        Measured(
            subnet.name,
            metrics={"loss": 4.0 - costs[subnet].parameters / 1e6, "perplexity": 50.0, "accuracy": 0.25},
            num_targets=128,
            parameters=costs[subnet].parameters,
            non_embedding_parameters=costs[subnet].non_embedding_parameters,
            flops_per_token=costs[subnet].flops_per_token,
            kv_bytes_per_token=costs[subnet].kv_bytes_per_token,
        )
        for subnet in SPACE
    ]


def set_keys(file: Path, **keys: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def add_code(folder: Path) -> Path:
    """Makes a model's directory one that carries code. Returns the file that the code would make if it ran."""
    ran = folder.parent / "ran"
    (folder / "theirs.py").write_text(
        f"open({str(ran)!r}, 'w')\nclass Config: pass\nclass Model: pass\nclass Words: pass\n"
    )
    names = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model", "AutoTokenizer": "theirs.Words"}
    set_keys(folder / "config.json", auto_map=names)
    set_keys(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["theirs.Words", "theirs.Words"]})
    set_keys(folder / "generation_config.json", auto_map={"AutoConfig": "theirs.Config"})
    return ran
