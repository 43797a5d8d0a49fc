"""Sorts a pre-trained model: its important attention groups and channels first, and an order of its layers.

In: a Hugging Face directory, and text. Out: a report of what sub-networks lose before and after. On disk: another
Hugging Face directory with the same function, and its sorted.json with the layer order, which a run file takes with
`space.layer_order = "model"`. Importance is measured on training rows, and losses on validation rows.
"""

import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from sorted_ds.base.errors import UserError
from sorted_ds.base.files import claim, remove_unfinished, replaced, share
from sorted_ds.base.names import CARD
from sorted_ds.data.loader import Batch, Rows
from sorted_ds.deploy.export import write_plain
from sorted_ds.deploy.license import base_of
from sorted_ds.deploy.model_dir import SORTED_JSON
from sorted_ds.families import family_of
from sorted_ds.nested import Family, NestedModel
from sorted_ds.nested.family import layers_of
from sorted_ds.nested.hf_weights import fingerprint, resolve_source
from sorted_ds.nested.importance import Importance, by_layer, entering, giving, layer_order, sort_units, watched
from sorted_ds.nested.layers import NestedLayer
from sorted_ds.nested.load import check_weights
from sorted_ds.nested.nest import nest_as
from sorted_ds.run.build import PROGRESS_COLUMNS, prepare_data
from sorted_ds.run.config import Run
from sorted_ds.run.model_config import SORTED_FOLDER, SORTED_FROM, model_config, require_sorted, sorted_source
from sorted_ds.space import Pass, SubNet, SubNetSpace
from sorted_ds.space.axes import DEPTH
from sorted_ds.tasks import LOSS, Prepared, SummedLoss, Task, task_of

LARGEST_RELATIVE_DIFFERENCE = 1e-4
"""The largest difference between the logits before and after sorting, divided by the largest logit, in fp32."""


@dataclass(frozen=True)
class Loads:
    """How much is measured."""

    tokens: int = 4096
    """Tokens on which importance is measured."""
    order_tokens: int = 1024
    """Tokens on which the loss without a layer is measured."""
    rows: int = 4
    """Rows of a forward pass."""
    fewest_layers: int = 0
    """How many layers the order does not rank; 0 for half of them."""


@dataclass(frozen=True)
class Report:
    """What sorting changed. Losses are in nats."""

    subnets: tuple[str, ...]
    before: tuple[float, ...]
    """The loss of each sub-network of the unsorted model."""
    after: tuple[float, ...]
    """After sorting, with depth as a prefix of the layers."""
    ordered: tuple[float, ...]
    """After sorting, with depth along the layer order."""
    layer_order: tuple[int, ...]
    losses_by_depth: dict[int, float]
    """The loss at each depth along the order, on the tokens that chose the order."""
    importance: dict[str, dict[int, list[float]]]
    """The share of each unit in the importance of its half, by axis and layer, the most important one first."""


@dataclass(frozen=True)
class Sorting:
    """A model that is being sorted, and the rows on which it is measured."""

    task: Task
    family: Family
    model: PreTrainedModel
    space: SubNetSpace
    """The sub-networks that the report shows."""
    calibration: Sequence[Batch]
    other: Sequence[Batch]
    """Rows that importance was not measured on."""
    loads: Loads

    def run(self, progress: Progress) -> Report:
        """Sorts `model` in place. Raises: UserError if its function changes."""
        before = self._losses(self.space, self.other)
        importance = self._importance(progress)
        probe, logits = self.other[0], self._logits(self.other[0])
        sort_units(self.model, self.family, importance)
        self._check_equal(logits, self._logits(probe))
        order, by_depth = self._layer_order(progress)
        axes = [letter for letter in self.space.axes if letter != DEPTH]
        return Report(
            subnets=tuple(subnet.name for subnet in self.space),
            before=before,
            after=self._losses(self.space, self.other),
            ordered=self._losses(SubNetSpace(self.space, layer_order=order), self.other),
            layer_order=order,
            losses_by_depth=by_depth,
            importance={axis: dict(by_layer(importance, axis)) for axis in axes},  # type: ignore[arg-type]
        )

    @torch.no_grad()
    def _importance(self, progress: Progress) -> Importance:
        bar = begun(progress, "importance", len(self.calibration))
        with watched(self.model, self.family) as importance:
            for batch in self.calibration:
                self.task.states(self.model, self.family, batch)
                progress.advance(bar)
        return importance

    def _layer_order(self, progress: Progress) -> tuple[tuple[int, ...], dict[int, float]]:
        measured, full = self._measured(self.space, self.other[: self._batches_of_order()]), self.space.full
        bar = begun(progress, "layer order", None)
        order, losses = layer_order(
            full.depth,
            self.loads.fewest_layers or full.depth // 2,
            measured.losses_without,
            lambda done, total: progress.update(bar, completed=done, total=total),
        )
        return order, {full.depth: measured.loss(Pass(full, "evaluate")), **losses}

    def _batches_of_order(self) -> int:
        tokens_of_batch = next(iter(self.other[0].values())).numel()
        return max(1, self.loads.order_tokens // tokens_of_batch)

    def _losses(self, space: SubNetSpace, batches: Sequence[Batch]) -> tuple[float, ...]:
        """Returns the loss of each sub-network of the model as it is now, in the order of the report."""
        measured = self._measured(space, batches)
        return tuple(measured.loss(Pass(subnet, "evaluate")) for subnet in self.space)

    def _measured(self, space: SubNetSpace, batches: Sequence[Batch]) -> "Measured":
        nested = nest_as(self.family, copy.deepcopy(self.model), space)
        return Measured(SummedLoss(nested, self.task, self.family).eval(), self.family, batches)

    @torch.no_grad()
    def _logits(self, batch: Batch) -> torch.Tensor:
        return self.task.logits(self.model, {name: value for name, value in batch.items() if name != "labels"}).float()

    @staticmethod
    def _check_equal(before: torch.Tensor, after: torch.Tensor) -> None:
        difference = float((before - after).abs().max() / before.abs().max())
        if not difference <= LARGEST_RELATIVE_DIFFERENCE:
            raise UserError(
                f"sorting changed the logits by {difference:.1e} of the largest one, so nothing was written. This is a "
                "defect of the program; please report it."
            )


@dataclass(frozen=True)
class Measured:
    """A nested model, and the rows on which its loss is measured."""

    summed: SummedLoss
    family: Family
    batches: Sequence[Batch]

    @torch.no_grad()
    def loss(self, pass_: Pass) -> float:
        """Returns the mean loss of a pass in nats."""
        return self._mean(self._sums(pass_, batch) for batch in self.batches)

    @torch.no_grad()
    def losses_without(self, left_out: tuple[int, ...]) -> Iterator[tuple[int, float]]:
        """Yields each other layer of the full network, and the loss without the layers `left_out` and it.

        The states that enter a layer do not depend on it. So they are computed once, and each pass begins behind the
        layer that it leaves out: half of the work.
        """
        full, layers = self._nested.space.full, layers_of(self._nested, self.family)
        states = []
        for batch in self.batches:
            with entering(self._nested, self.family) as found:
                self._sums(Pass(full, "evaluate", dropped=left_out), batch)
            states.append(found)
        for number, layer in enumerate(layers):
            if number in left_out:
                continue
            dropped = tuple(sorted({*range(number), *left_out}))
            assert isinstance(layer, NestedLayer)
            sums = []
            for batch, found in zip(self.batches, states, strict=True):
                with giving(layer, found[number]):
                    sums.append(self._sums(Pass(full, "evaluate", dropped=dropped), batch))
            yield number, self._mean(sums)

    def _sums(self, pass_: Pass, batch: Batch) -> tuple[float, float]:
        self._nested.set_pass(pass_)
        nll, targets = self.summed(mode="evaluate", **batch)[LOSS]
        return float(nll), float(targets)

    @property
    def _nested(self) -> NestedModel:
        assert isinstance(self.summed.model, NestedModel)
        return self.summed.model

    @staticmethod
    def _mean(sums: Iterable[tuple[float, float]]) -> float:
        nll, targets = (sum(each) for each in zip(*sums, strict=True))
        return nll / targets


def prepare(run: Run, console: Console) -> Prepared:
    """Prepares the data of a run, and with `model.sort` its model. Returns the data. Prints progress and a summary.

    Raises: UserError for data or a model that cannot be used.
    """
    data = prepare_data(run, console)
    if run.model.sort:
        prepare_model(run, data, console)
    return data


def prepare_model(run: Run, data: Prepared, console: Console) -> None:
    """Writes the sorted model to RUN_DIR/sorted if it is not there yet. Raises: UserError if another model is there."""
    config, source = model_config(run), resolve_source(run.model.init)
    if not sorted_source(run):
        with claim(run.run_dir):
            remove_unfinished(run.run_dir, SORTED_FOLDER)
            if not sorted_source(run):  # another process may have sorted it while this one waited
                _sort_for(run, source, config, data, console)
    require_sorted(run)


def _sort_for(run: Run, source: Path, config: PreTrainedConfig, data: Prepared, console: Console) -> None:
    folder = run.run_dir / SORTED_FOLDER
    report = sort_model(source, config, task_of(run.task), data, run.batch.row_tokens, folder, Loads())
    sorted_losses = report.ordered if run.space.layer_order == "model" else report.after
    before, after = (sum(losses) / len(losses) for losses in (report.before, sorted_losses))
    told = f"sorted into {folder}: the mean loss of {len(report.subnets)} sub-networks was {before:.3f}"
    console.print(f"{told} and is {after:.3f}", highlight=False, markup=False, soft_wrap=True)


def sort_model(
    source: Path, config: PreTrainedConfig, task: Task, data: Prepared, row_tokens: int, out: Path, loads: Loads
) -> Report:
    """Writes the sorted model to `out`, complete or not at all. Returns what sorting changed.

    Raises: UserError for a model that cannot be read or sorted, or a directory that cannot be written.
    """
    family = family_of(config.model_type)
    space = shown_space(family, config)
    check_weights(family, config, space, source)
    model = family.auto_class.from_pretrained(
        source,
        config=copy.deepcopy(config),
        dtype=torch.float32,
        attn_implementation=config._attn_implementation,
        local_files_only=True,
        trust_remote_code=False,
    ).eval()
    train, validation = (task.rows(data, row_tokens, is_validation) for is_validation in (False, True))
    calibration = list(batches_of(task, train, row_tokens, loads.tokens, loads.rows))
    other = list(batches_of(task, validation, row_tokens, loads.tokens, loads.rows))
    console = Console(stderr=True)
    with Progress(*PROGRESS_COLUMNS, console=console, transient=True, disable=not console.is_terminal) as progress:
        report = Sorting(task, family, model, space, calibration, other, loads).run(progress)
    stated = config.dtype or torch.float32
    dtype = getattr(torch, stated) if isinstance(stated, str) else stated
    write(model, dtype, source, task, out, report)
    return report


def begun(progress: Progress, title: str, total: int | None) -> TaskID:
    """Returns a new bar of a part of the work. Where bars are not shown, a line says that the part has begun."""
    if progress.disable:
        progress.console.print(f"sorting: {title}", highlight=False)
    return progress.add_task(title, total=total)


def batches_of(task: Task, rows: Rows, row_tokens: int, num_tokens: int, size: int) -> Iterator[Batch]:
    """Yields rows that are spread evenly over the data, as batches of at most `size` rows."""
    num = min(len(rows), max(1, num_tokens // row_tokens))
    chosen: list[Any] = [rows[number * len(rows) // num] for number in range(num)]
    for start in range(0, num, size):
        part = chosen[start : start + size]
        yield task.collate(part, len(part), row_tokens).inputs


def shown_space(family: Family, config: PreTrainedConfig) -> SubNetSpace:
    """Returns the sub-networks of the report: three quarters and a half of each axis alone, and of all together."""
    full = family.full(config)
    quarters = {letter: [max(1, size * part // 4) for part in (2, 3)] for letter, size in full.sizes}
    found = {full}
    for index in range(2):
        for axes in (*((letter,) for letter, _ in full.sizes), tuple(letter for letter, _ in full.sizes)):
            found.add(full.replace(**{letter: quarters[letter][index] for letter in axes}))
        found.add(full.replace(**{letter: quarters[letter][index] for letter in (DEPTH, full.axes[-1])}))
    return SubNetSpace([subnet for subnet in found if is_possible(family, config, subnet)])


def is_possible(family: Family, config: PreTrainedConfig, subnet: SubNet) -> bool:
    """Returns whether the family accepts the sizes."""
    with suppress(UserError):
        family.check(SubNetSpace({subnet, family.full(config)}), config)
        return True
    return False


def write(model: PreTrainedModel, dtype: torch.dtype, source: Path, task: Task, out: Path, report: Report) -> None:
    """Writes the directory, with weights in `dtype`. Raises: UserError when it cannot be written."""
    try:
        with replaced(out, durable=True, overwrite=False) as hidden:
            hidden.mkdir()
            write_plain(model, dtype, task, source, base_of(source, None), hidden)
            if (source / CARD).is_file():
                (hidden / CARD).write_bytes((source / CARD).read_bytes())
            facts = {"layer_order": report.layer_order, SORTED_FROM: fingerprint(source), "sorted": asdict(report)}
            (hidden / SORTED_JSON).write_text(json.dumps(facts) + "\n", encoding="utf-8")
            share(hidden)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} could not be written: {error}. Free the space, or name another --out.") from error
