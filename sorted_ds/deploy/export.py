"""Export: a sub-network as an ordinary Hugging Face model directory, proven equal before it appears.

In: a trained model's directory and a sub-network's name. Out: OUT/ with safetensors, config, generation config,
tokenizer, model card; with `store_logits` also logits.safetensors (the inputs and `logits`), for another process to
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

from sorted_ds.base.errors import UserError
from sorted_ds.base.files import share
from sorted_ds.data.loader import Batch
from sorted_ds.deploy.card import model_card
from sorted_ds.deploy.evaluate import load_nested, stored_dtype
from sorted_ds.deploy.model_dir import ModelDir
from sorted_ds.nested import NestedModel, extract
from sorted_ds.space import SubNet
from sorted_ds.tasks import Task, task_of

LARGEST_RELATIVE_DIFFERENCE = 1e-5
"""Of the largest logit. Both models compute in fp32, also where the weights are stored in bf16: widening them is exact,
so the bound is the same. What is left is the order of sums: input-side weights are stored transposed when nested."""

LOGITS_FILE = "logits.safetensors"


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
    task = task_of(where.read().task)
    model = load_nested(folder, dtype=torch.float32)
    subnets = [model.space[name] for name in names]
    probe = task.probe(where.model, model.config)
    for subnet, out in zip(subnets, outs, strict=True):
        _export_one(model, task, where, subnet, out, probe, store_logits)
    return list(outs)


def _export_one(
    model: NestedModel, task: Task, where: ModelDir, subnet: SubNet, out: Path, probe: Batch, store_logits: bool
) -> None:
    hidden = out.parent / f".writing_{out.name}_{os.getpid()}"
    try:
        hidden.mkdir(parents=True)
        _write(model, task, where, subnet, hidden, out.name)
        logits = _compare(model, task, subnet, hidden, probe)
        if store_logits:
            save_file({**probe, "logits": logits}, hidden / LOGITS_FILE)
        share(hidden)
        hidden.rename(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} could not be written: {error}. Free the space, or name another --out.") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _write(model: NestedModel, task: Task, where: ModelDir, subnet: SubNet, hidden: Path, name: str) -> None:
    """The files, in the precision in which the full network is stored."""
    plain = extract(model, subnet)
    nn.Module.to(plain, stored_dtype(where))
    plain.save_pretrained(hidden)
    task.copy_processor(where.model, hidden)
    card = model_card(where.read(), subnet, model.family, plain.config, task, name)
    (hidden / "README.md").write_text(card, encoding="utf-8")


@torch.no_grad()
def _compare(model: NestedModel, task: Task, subnet: SubNet, hidden: Path, probe: Batch) -> Tensor:
    """The nested model's outputs. Raises: LogitsDifferError when those of the written files differ."""
    model.set_subnet(subnet)
    expected = task.logits(model, probe)
    model.set_subnet(model.space.full)
    written = model.family.auto_class.from_pretrained(
        hidden, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    difference = ((task.logits(written, probe) - expected).abs().max() / expected.abs().max()).item()
    if not difference <= LARGEST_RELATIVE_DIFFERENCE:
        raise LogitsDifferError(
            f"{subnet} was not exported: the written model's logits differ from the nested one's by {difference:.1e} "
            f"of the largest logit ({LARGEST_RELATIVE_DIFFERENCE:.0e} is allowed). Please report it."
        )
    return expected
