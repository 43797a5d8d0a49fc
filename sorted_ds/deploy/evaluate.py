"""Evaluates sub-networks: the metrics of each one on the same validation rows.

In: micro-batches of validation rows, and a function that runs a sub-network on one. Out: a `Measured` for each one.
During training the function runs the engine, on all ranks. Afterwards `sorted-ds eval DIR` runs a model from disk in
one process. On disk: the table in sorted.json and subnets.json, and pareto.png. Ranks exchange sums; means are computed
at the end.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sorted_ds.base.errors import UserError
from sorted_ds.data.loader import MicroBatch, validation_batches
from sorted_ds.deploy.family import TrainedFamily
from sorted_ds.deploy.figures import draw_pareto
from sorted_ds.deploy.model_dir import FROM_RUN_DIR, SORTED_JSON, TOKENS_DIR, Measured, ModelDir, Sorted
from sorted_ds.deploy.view import view
from sorted_ds.nested import Family, costs_of
from sorted_ds.space import Cost, SubNet
from sorted_ds.tasks import LOSS, Metric, Prepared, SummedLoss, Task, task_of
from sorted_ds.tasks.task import Sums

MICRO_BATCH_TOKENS = 8192
"""The tokens of one forward pass of `sorted-ds eval`: enough for full speed, and little memory at any depth."""

Forward = Callable[[MicroBatch, SubNet], Sums]
"""Runs a sub-network on a micro-batch and returns the task's sums."""


def evaluate_subnets(
    forward: Forward,
    subnets: Iterable[SubNet],
    batches: Sequence[MicroBatch],
    metrics: Sequence[Metric],
    sum_over_ranks: Callable[[list[float]], list[float]],
    costs: Mapping[SubNet, Cost],
) -> list[Measured]:
    """Measures every sub-network on the same rows. Every rank must call this, with its own part of the rows.

    `batches`: this rank's rows, at least one micro-batch.
    """
    return [
        _measured(subnet, _totals(forward, subnet, batches, sum_over_ranks), metrics, costs[subnet])
        for subnet in subnets
    ]


def _totals(
    forward: Forward,
    subnet: SubNet,
    batches: Sequence[MicroBatch],
    sum_over_ranks: Callable[[list[float]], list[float]],
) -> dict[str, tuple[float, float]]:
    """Returns the sums and counts of all batches on all ranks, by name."""
    sums_of_batches = [forward(batch, subnet) for batch in batches]
    flat = [torch.stack([value.double() for pair in sums.values() for value in pair]) for sums in sums_of_batches]
    totals = sum_over_ranks(torch.stack(flat).sum(0).tolist())
    return dict(zip(sums_of_batches[0], zip(totals[::2], totals[1::2], strict=True), strict=True))


def _measured(
    subnet: SubNet, totals: dict[str, tuple[float, float]], metrics: Sequence[Metric], cost: Cost
) -> Measured:
    return Measured(
        subnet=subnet.name,
        metrics={metric.name: metric.value(totals) for metric in metrics},
        num_targets=round(totals[LOSS][1]),
        parameters=cost.parameters,
        non_embedding_parameters=cost.non_embedding_parameters,
        flops_per_token=cost.flops_per_token,
        kv_bytes_per_token=cost.kv_bytes_per_token,
    )


def choose_spread(subnets: Sequence[SubNet], number: int = 9) -> list[SubNet]:
    """Returns about `number` of the sub-networks, evenly spread over their order, with the first and the last."""
    if len(subnets) <= number:
        return list(subnets)
    return [subnets[p] for p in sorted({round(k * (len(subnets) - 1) / (number - 1)) for k in range(number)})]


def evaluate_family(
    family: TrainedFamily,
    subnets: Sequence[SubNet],
    rows: int | None = None,
    report: Callable[[str], None] = lambda name: None,
) -> tuple[Measured, ...]:
    """Measures sub-networks of a trained family on its validation rows. Writes the table and the figure.

    Returns the whole table. `rows`: replaces the run's number of validation rows. `report`: called with the name of
    each sub-network before it is measured.

    Raises: UserError for files that are missing or damaged.
    """
    where, contents, space = family.where, family.contents, family.space
    task = task_of(contents.task)
    data = task.open_prepared(data_folder(where, contents.data))
    batches = _validation_batches(task, data, contents, rows or contents.eval_rows)
    _check_rows(contents, subnets, sum(batch.num_targets for batch in batches))
    costs = costs_of(subnets, family.architecture, family.config, contents.row_tokens)
    whole = family.read(subnets[0]) if len(subnets) == 1 else family.full
    measured = []
    for subnet in subnets:
        report(subnet.name)
        model = whole if len(subnets) == 1 else view(whole, subnet, space=space)
        forward = forward_of(model, task, family.architecture)
        (row,) = evaluate_subnets(forward, [subnet], batches, task.metrics, list, costs)
        measured.append(replace(row, is_trained=subnet in space))
    return save_table(where, measured, task, data)


def _check_rows(contents: Sorted, subnets: Sequence[SubNet], num_targets: int) -> None:
    """Raises: UserError when the new rows of the table could not be compared with rows that it already has."""
    measured_again = {subnet.name for subnet in subnets}
    others = {row.subnet for row in contents.subnets if row.num_targets != num_targets} - measured_again
    if others:
        raise UserError(
            f"the table holds {len(others)} sub-networks that were measured on another number of validation rows, so "
            "they cannot be compared. Leave out --rows, or leave out --subnets to measure all again."
        )


def forward_of(model: PreTrainedModel, task: Task, family: Family) -> Forward:
    """Returns a function that runs a sub-network's plain model in this process. Its head becomes a loss head."""
    loss, device = SummedLoss(model, task, family), model.device

    @torch.no_grad()
    def forward(batch: MicroBatch, subnet: SubNet) -> Sums:
        return loss(mode="evaluate", **{name: value.to(device) for name, value in batch.inputs.items()})

    return forward


def save_table(where: ModelDir, measured: Sequence[Measured], task: Task, data: Prepared) -> tuple[Measured, ...]:
    """Adds rows to the table (sorted.json, subnets.json), draws the figure, and returns the whole table."""
    baseline = baseline_of(task, data)
    table = where.add_measured(measured, baseline)
    draw_pareto(table, baseline, len(where.read().space), where.root)
    return table


def baseline_of(task: Task, data: Prepared) -> dict[str, float] | None:
    """Returns the name and the loss of the task's baseline, if it has one."""
    baseline = task.baseline(data)
    return None if baseline is None else {baseline.name: baseline.loss}


def data_folder(where: ModelDir, data: Mapping[str, object]) -> Path:
    """Returns the folder of the prepared data.

    It is where it was at training, or, if run and data were moved together, at the same place relative to the run.
    """
    folder = data.get(TOKENS_DIR)
    if not isinstance(folder, str):
        raise UserError(f"{where.model / SORTED_JSON} has no data.{TOKENS_DIR}. Train again, or copy the file again.")
    for found in (Path(folder), where.root / str(data.get(FROM_RUN_DIR, folder))):
        if found.is_dir():
            return found
    raise UserError(
        f"the prepared data of {where.root} should be in {folder}, which does not exist. Put it there, or run "
        "`sorted-ds prepare RUN.toml` with the same data.cache_dir."
    )


def _validation_batches(task: Task, data: Prepared, contents: Sorted, num_rows: int) -> list[MicroBatch]:
    row_tokens = contents.row_tokens
    rows = task.rows(data, row_tokens, is_validation=True, isolate=contents.isolate)
    micro_batch_rows = max(1, MICRO_BATCH_TOKENS // row_tokens)
    collate = partial(task.collate, row_tokens=row_tokens)
    num_rows = min(num_rows, len(rows))
    return list(validation_batches(rows, collate, num_rows, micro_batch_rows, rank=0, world_size=1))
