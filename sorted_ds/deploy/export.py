"""Exports a sub-network as an ordinary Hugging Face model directory, after a proof that both give equal logits.

In: a trained model's directory and a sub-network's name. On disk: OUT/ with safetensors, config, generation config,
tokenizer and model card; with `store_logits` also logits.safetensors (the inputs and their logits), with which another
process can compare. Only those ranges of the full network's files are read that the sub-network holds. The model is
written into a hidden folder, loaded back by plain transformers, and compared. Then the folder is renamed. So OUT is
complete and equal, or does not exist.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from sorted_ds.base.errors import UserError
from sorted_ds.base.files import replaced, share
from sorted_ds.base.names import CARD
from sorted_ds.data.loader import Batch
from sorted_ds.deploy.card import model_card
from sorted_ds.deploy.family import TrainedFamily, load, stored_dtype
from sorted_ds.deploy.license import copy_license_files
from sorted_ds.deploy.model_dir import Base, ModelDir
from sorted_ds.nested.save import add_older_names
from sorted_ds.space import SubNet
from sorted_ds.tasks import Task, task_of

LARGEST_RELATIVE_DIFFERENCE = 1e-5
"""The largest difference between the logits of an exported model and of the sub-network in the full network's files,
divided by the largest logit.

Both models compute in fp32, also if the weights are stored in bf16, because every bf16 number is a fp32 number."""

LOGITS_FILE = "logits.safetensors"


class LogitsDifferError(Exception):
    """The written model has other logits than the sub-network, and was deleted. This is a defect of the program."""


def export(folder: Path, names: Sequence[str], outs: Sequence[Path], store_logits: bool = False) -> list[Path]:
    """Writes each named sub-network of the trained model in `folder` to its directory in `outs`. Returns `outs`.

    Raises: UserError for an unknown name, a directory that exists or cannot be written, or a model that is damaged;
    LogitsDifferError.
    """
    for out in outs:
        if out.exists():
            raise UserError(f"{out} already exists. Name another --out, or delete it.")
    family = load(folder, dtype=torch.float32)
    task = task_of(family.contents.task)
    subnets = [family.find(name) for name in names]
    probe = task.probe(family.where.model, family.config)
    for subnet, out in zip(subnets, outs, strict=True):
        _export_one(family, task, subnet, out, probe, store_logits)
    return list(outs)


def _export_one(family: TrainedFamily, task: Task, subnet: SubNet, out: Path, probe: Batch, store_logits: bool) -> None:
    plain = family.read(subnet)
    try:
        with replaced(out, overwrite=False) as hidden:
            hidden.mkdir()
            logits = _logits(plain, task, family.where, subnet, probe)
            _write(plain, task, family, subnet, hidden, out.name)
            _compare(family, task, subnet, hidden, probe, logits)
            if store_logits:
                save_file({**probe, "logits": logits}, hidden / LOGITS_FILE)
            share(hidden)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} could not be written: {error}. Free the space, or name another --out.") from error


def _write(plain: PreTrainedModel, task: Task, family: TrainedFamily, subnet: SubNet, hidden: Path, name: str) -> None:
    """Writes the files of the model, in the precision in which the full network is stored."""
    trained, source = family.contents, family.where.model
    write_plain(plain, stored_dtype(family.where), task, source, trained.base, hidden)
    bound = LARGEST_RELATIVE_DIFFERENCE
    card = model_card(trained, subnet, family.architecture, plain.config, task, hidden, name, bound)
    (hidden / CARD).write_text(card, encoding="utf-8")


def write_plain(
    plain: PreTrainedModel, dtype: torch.dtype, task: Task, source: Path, base: Base | None, folder: Path
) -> None:
    """Writes a plain model in `dtype`, with the processor and the license files of the directory `source`.

    `base`: what `source` was trained from, which may name a license file. Changes the dtype of `plain`.

    Raises: OSError.
    """
    nn.Module.to(plain, dtype)
    plain.save_pretrained(folder)
    add_older_names(folder)
    task.copy_processor(source, folder)
    copy_license_files(source, folder, base)


@torch.no_grad()
def _logits(plain: PreTrainedModel, task: Task, where: ModelDir, subnet: SubNet, probe: Batch) -> Tensor:
    """Returns the logits of the sub-network as it was read. Raises: UserError when they are not finite."""
    logits = task.logits(plain, probe)
    if not logits.isfinite().all():
        raise UserError(
            f"{where.model}: the logits of {subnet} are not finite, although the weights are. Train again from an "
            "earlier checkpoint, or correct config.json if it was changed."
        )
    return logits


@torch.no_grad()
def _compare(family: TrainedFamily, task: Task, subnet: SubNet, hidden: Path, probe: Batch, expected: Tensor) -> None:
    """Raises: LogitsDifferError when the logits of the written files differ from those of the sub-network."""
    written = family.architecture.auto_class.from_pretrained(
        hidden, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    difference, largest = (task.logits(written, probe) - expected).abs().max(), expected.abs().max()
    if not difference <= LARGEST_RELATIVE_DIFFERENCE * largest:
        raise LogitsDifferError(
            f"{subnet} was not exported: the written model's logits differ from the full network's by "
            f"{difference / largest:.1e} of the largest logit; {LARGEST_RELATIVE_DIFFERENCE:.0e} is allowed. Please "
            "report this."
        )
