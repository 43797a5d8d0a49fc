"""Export: a sub-network as an ordinary Hugging Face model directory, proven equal before it appears.

In: a trained model's directory and a sub-network's name. Out: OUT/ with safetensors, config, generation config,
tokenizer, model card; with `store_logits` also logits.safetensors (`input_ids`, `logits`), for another process to
compare with. Written to a hidden sibling, loaded back by plain transformers, compared, then renamed: OUT is complete
and equal, or absent.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sorted_ds.base.errors import UserError
from sorted_ds.base.files import share
from sorted_ds.data.text.content_key import TOKENIZER_FILES
from sorted_ds.deploy.card import model_card
from sorted_ds.deploy.evaluate import load_nested, stored_dtype
from sorted_ds.deploy.model_dir import ModelDir
from sorted_ds.nested import NestedModel, extract
from sorted_ds.space import SubNet

LARGEST_RELATIVE_DIFFERENCE = 1e-5
"""Of the largest logit. Both models compute in fp32, also where the weights are stored in bf16: widening them is exact,
so the bound is the same. What is left is the order of sums: input-side weights are stored transposed when nested."""

COPIED_FILES = (*TOKENIZER_FILES, "chat_template.jinja")
LOGITS_FILE = "logits.safetensors"
COMPARED_TOKENS = 64
COMPARED_RANDOM_ROWS = 3
COMPARED_TEXT = (
    "The quick brown fox jumps over the lazy dog, and returns 42 of them:\n"
    "def add(left, right):\n    return left + right  # as expected\n"
    "Numbers 0123456789, (brackets) [and] {braces}; naïve café, λ → 東京.\n"
) * 8


class LogitsDifferError(Exception):
    """The written model is not the nested one: nothing is left of it."""


def export(folder: Path, names: Sequence[str], outs: Sequence[Path], store_logits: bool = False) -> list[Path]:
    """Writes each named sub-network of the trained model in `folder` to the `outs` of the same place.

    Raises: UserError for an unknown name, an `out` that exists or cannot be written; LogitsDifferError.
    """
    for out in outs:
        if out.exists():
            raise UserError(f"{out} exists already. Name another --out, or delete it.")
    where = ModelDir.find(folder)
    tokenizer = load_tokenizer(where.model)
    model = load_nested(folder, dtype=torch.float32)
    subnets = [model.space[name] for name in names]
    input_ids = compared_ids(tokenizer, model)
    for subnet, out in zip(subnets, outs, strict=True):
        _export_one(model, where, subnet, out, input_ids, store_logits)
    return list(outs)


def _export_one(
    model: NestedModel, where: ModelDir, subnet: SubNet, out: Path, input_ids: Tensor, store_logits: bool
) -> None:
    hidden = out.parent / f".writing_{out.name}_{os.getpid()}"
    try:
        hidden.mkdir(parents=True)
        _write(model, where, subnet, hidden, out.name)
        logits = _compare(model, subnet, hidden, input_ids)
        if store_logits:
            save_file({"input_ids": input_ids, "logits": logits}, hidden / LOGITS_FILE)
        share(hidden)
        hidden.rename(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} could not be written: {error}. Free the space, or name another --out.") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _write(model: NestedModel, where: ModelDir, subnet: SubNet, hidden: Path, name: str) -> None:
    """The files, in the precision in which the full network is stored."""
    plain = extract(model, subnet)
    nn.Module.to(plain, stored_dtype(where))
    plain.save_pretrained(hidden)
    for file in COPIED_FILES:
        if (where.model / file).is_file():
            shutil.copyfile(where.model / file, hidden / file)
    config = AutoConfig.from_pretrained(hidden, local_files_only=True)
    (hidden / "README.md").write_text(model_card(where.read(), subnet, config, name), encoding="utf-8")


@torch.no_grad()
def _compare(model: NestedModel, subnet: SubNet, hidden: Path, input_ids: Tensor) -> Tensor:
    """The nested model's logits. Raises: LogitsDifferError when those of the written files are others.

    Shapes: [B, T] -> [B, T, V].
    """
    model.set_subnet(subnet)
    expected = model(input_ids, use_cache=False).logits
    model.set_subnet(model.space.full)
    written = AutoModelForCausalLM.from_pretrained(hidden, dtype=torch.float32, local_files_only=True).eval()
    difference = ((written(input_ids, use_cache=False).logits - expected).abs().max() / expected.abs().max()).item()
    if not difference <= LARGEST_RELATIVE_DIFFERENCE:
        raise LogitsDifferError(
            f"{subnet} was not exported: the written model's logits differ from the nested one's by {difference:.1e} "
            f"of the largest logit ({LARGEST_RELATIVE_DIFFERENCE:.0e} is allowed). Please report it."
        )
    return expected


def load_tokenizer(folder: Path):
    """Raises: UserError when the directory holds no tokenizer that transformers can read."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder} holds no tokenizer ({reason}). Put the tokenizer's files there.") from error


def compared_ids(tokenizer, model: NestedModel) -> Tensor:
    """Rows of ids for the comparison: a fixed text, and random ids of the whole vocabulary. Shape [B, T]."""
    length = min(COMPARED_TOKENS, model.config.max_position_embeddings)
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(vocabulary, (1 + COMPARED_RANDOM_ROWS, length), generator=generator)
    text = torch.tensor(tokenizer(COMPARED_TEXT)["input_ids"][:length])
    if len(text) and text.max() >= vocabulary:
        raise UserError(f"the tokenizer gives id {int(text.max())}, but the model knows {vocabulary}. Use its own one.")
    rows[0, : len(text)] = text
    return rows
