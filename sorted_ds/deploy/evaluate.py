"""Evaluation: the loss of every sub-network on the same validation rows.

In: micro-batches of validation rows and something that runs a sub-network on one. Out: `Measured` for each, during
training (through the engine, on all ranks) or afterwards (`sorted-ds eval DIR`, one process, a model from disk); then
also on disk: the table in sorted.json and subnets.json, and pareto.png. Sums travel, means are made at the end.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from sorted_ds.base.errors import UserError
from sorted_ds.deploy.model_dir import SORTED_JSON, Measured, ModelDir, Sorted
from sorted_ds.nested import NestedModel, costs_of
from sorted_ds.nested.load import build
from sorted_ds.space import Cost, SubNet, SubNetSpace
from sorted_ds.tasks.losses import SummedLoss

if TYPE_CHECKING:
    from sorted_ds.data.loader import MicroBatch

MICRO_BATCH_TOKENS = 8192
"""Tokens of one forward pass of `sorted-ds eval`: enough for full speed, little memory at any depth."""

Forward = Callable[["MicroBatch", SubNet], tuple[Tensor, Tensor]]
"""Summed nats and number of right next tokens of one micro-batch through one sub-network."""


def measure(
    forward: Forward,
    subnets: Iterable[SubNet],
    batches: Sequence["MicroBatch"],
    sum_over_ranks: Callable[[list[float]], list[float]],
    costs: Mapping[SubNet, Cost],
) -> list[Measured]:
    """Every sub-network on the same rows. With several ranks, `batches` are this rank's share: a collective.

    Units: loss in nats per target.
    """
    subnets = list(subnets)
    sums = [float(sum(batch.num_targets for batch in batches))]
    for subnet in subnets:
        results = [torch.stack([value.double() for value in forward(batch, subnet)]) for batch in batches]
        sums += torch.stack(results).sum(0).tolist() if results else [0.0, 0.0]
    num_targets, *totals = sum_over_ranks(sums)
    return [
        _measured(subnet, nll, correct, round(num_targets), costs[subnet])
        for subnet, nll, correct in zip(subnets, totals[::2], totals[1::2], strict=True)
    ]


def _measured(subnet: SubNet, nll: float, num_correct: float, num_targets: int, cost: Cost) -> Measured:
    loss = nll / num_targets
    return Measured(
        subnet=subnet.name,
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        accuracy=num_correct / num_targets,
        num_targets=num_targets,
        parameters=cost.parameters,
        non_embedding_parameters=cost.non_embedding_parameters,
        flops_per_token=cost.flops_per_token,
        kv_bytes_per_token=cost.kv_bytes_per_token,
    )


def choose_spread(space: SubNetSpace, number: int = 9) -> list[SubNet]:
    """About `number` sub-networks at equal distances in the space's order, the smallest and the full one among them."""
    if len(space) <= number:
        return list(space)
    positions = {round(k * (len(space) - 1) / (number - 1)) for k in range(number)}
    return sorted({space[p] for p in positions} | {space.smallest, space.full}, key=space.index)


def load_nested(folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> NestedModel:
    """The nested model of a run's directory, or of a Hugging Face directory with a sorted.json, for evaluation.

    `dtype` None keeps the stored precision. Raises: UserError when files are missing, damaged or of another model.
    """
    where = ModelDir.find(folder)
    space = SubNetSpace.of(where.read().space)
    config = _config(where)
    return build(config, space, where.model, seed=0, dtype=dtype or stored_dtype(where), device=device).eval()


def stored_dtype(where: ModelDir) -> torch.dtype:
    """The precision of the weights on disk, as the config says."""
    dtype = _config(where).dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _config(where: ModelDir) -> PreTrainedConfig:
    if not (where.model / "config.json").is_file():
        raise UserError(f"{where.model} has a {SORTED_JSON} but no config.json. Get the model's files again.")
    return AutoConfig.from_pretrained(where.model, local_files_only=True)


@dataclass(frozen=True)
class Evaluation:
    """What `sorted-ds eval` measured."""

    measured: tuple[Measured, ...]
    """The whole table, ascending in parameters."""
    unigram_nats: float


def evaluate_directory(
    folder: Path,
    names: Sequence[str] | None = None,
    rows: int | None = None,
    device: torch.device | str = "cpu",
    report: Callable[[str], None] = lambda name: None,
) -> Evaluation:
    """Measures all (or the named) sub-networks of a trained model on its validation rows; writes table and figure.

    `rows` overrides the run's number of validation rows; `report` hears each sub-network's name before it starts.

    Raises: UserError for a name that is not in the space, or files that are missing.
    """
    from sorted_ds.data.text.prepare import open_tokens

    where = ModelDir.find(folder)
    contents = where.read()
    model = load_nested(folder, device=device)
    subnets = [model.space[name] for name in names] if names else list(model.space)
    tokens = open_tokens(_tokens_dir(where, contents.data))
    batches = _validation_batches(tokens, contents.row_tokens, rows or contents.eval_rows)
    _check_rows(contents, names, sum(batch.num_targets for batch in batches))
    costs = costs_of(model.space, model.config, contents.row_tokens)
    measured = []
    for subnet in subnets:
        report(subnet.name)
        measured += measure(forward_of(model), [subnet], batches, list, costs)
    return save(where, measured, tokens.unigram_nats)


def _check_rows(contents: Sorted, names: Sequence[str] | None, num_targets: int) -> None:
    """Raises: UserError when measuring some on other rows would cost the table those that it has."""
    others = {row.subnet for row in contents.subnets if row.num_targets != num_targets} - set(names or contents.space)
    if others:
        raise UserError(
            f"the table holds {len(others)} sub-networks that were measured on other rows, which cannot be compared. "
            "Leave out --rows, or measure all: leave out --subnets."
        )


def forward_of(model: NestedModel) -> Forward:
    """Runs a nested model in this process. The model's head becomes a loss head."""
    loss, device = SummedLoss(model), model.device

    @torch.no_grad()
    def forward(batch: "MicroBatch", subnet: SubNet) -> tuple[Tensor, Tensor]:
        model.set_subnet(subnet)
        nll_sum, num_correct = loss(batch.input_ids.to(device), batch.labels.to(device), count_correct=True)
        return nll_sum, num_correct

    return forward


def save(where: ModelDir, measured: Sequence[Measured], unigram_nats: float) -> Evaluation:
    """Writes the table (sorted.json, subnets.json) and the figure, and returns the whole table."""
    from sorted_ds.deploy.figures import draw_pareto

    table = where.add_measured(measured, unigram_nats)
    draw_pareto(table, unigram_nats, len(where.read().space), where.root)
    return Evaluation(table, unigram_nats)


def _tokens_dir(where: ModelDir, data: Mapping[str, object]) -> Path:
    """Where they were at training, or at the same place as seen from the run's directory, if both were moved."""
    folder = data.get("tokens_dir")
    if not isinstance(folder, str):
        raise UserError(f"{where.model / SORTED_JSON} names no data.tokens_dir. Train again, or get the file again.")
    for found in (Path(folder), where.root / str(data.get("from_run_dir", folder))):
        if found.is_dir():
            return found
    raise UserError(
        f"the prepared tokens of {where.root} are not in {folder}. Put them there, or run `sorted-ds prepare RUN.toml` "
        "with the same data.cache_dir."
    )


def _validation_batches(tokens, row_tokens: int, num_rows: int) -> list["MicroBatch"]:
    from sorted_ds.data.loader import validation_batches
    from sorted_ds.data.rows import PackedRows

    packed = PackedRows(tokens.validation, row_tokens, "validation")
    micro_batch_rows = max(1, MICRO_BATCH_TOKENS // row_tokens)
    return list(validation_batches(packed, min(num_rows, len(packed)), micro_batch_rows, rank=0, world_size=1))
