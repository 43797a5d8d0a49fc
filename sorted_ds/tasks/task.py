"""Defines `Task`, the only object that knows what a network is trained for.

In: a run's settings. Out: what a micro-batch holds, how a forward pass becomes sums, which metrics are shown, and how
the data is prepared. The loop, the engine, the checkpoints, the monitor and `eval` do not know which task runs. A new
task is one file beside `causal_lm.py` and an entry in `TASKS` (tasks/__init__.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from sorted_ds.base.names import LOSS
from sorted_ds.data.loader import Batch, MicroBatch, Rows
from sorted_ds.data.text.pieces import Piece
from sorted_ds.nested.family import Family
from sorted_ds.space.passes import Mode
from sorted_ds.tasks.losses import Parts, Teacher, Terms

Sums = dict[str, tuple[Tensor, Tensor]]
"""Name -> (sum, count) over a batch, the loss first. Means are computed from the totals over all batches and ranks."""
Totals = Mapping[str, tuple[float, float]]
"""Name -> (sum, count) over all batches and ranks."""
Report = Callable[[float, float], None]
"""Called with the progress of some work: how much is done, and how much there is."""


@dataclass(frozen=True)
class Metric:
    """A number that tables and model cards show for each sub-network."""

    name: str
    title: str
    """The title of a table's column, with the unit."""
    value: Callable[[Totals], float]
    """Computes the value from the totals."""
    text: Callable[[float], str]
    """Formats a value."""


@dataclass(frozen=True)
class Baseline:
    """The loss of a trivial model, to compare with."""

    name: str
    loss: float


class Prepared(Protocol):
    """The prepared data of a run on disk."""

    @property
    def key(self) -> str:
        """The content key. Data with the same key is the same."""

    @property
    def folder(self) -> Path:
        """The folder of the data."""


class Task(Protocol):
    """What a network is trained for."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that are shown. The first one is the loss."""

    @property
    def pipeline_tag(self) -> str:
        """Hugging Face's name of what an exported model is used for, such as `text-generation`."""

    # Data

    def prepare(self, run: Any, report: Report) -> Prepared:
        """Returns the run's data, and prepares it if it is not on disk. Raises: UserError when it cannot be used."""

    def find_prepared(self, run: Any) -> Prepared:
        """Returns the run's data. Raises: UserError when it is not prepared."""

    def open_prepared(self, folder: Path) -> Prepared:
        """Returns the data of a folder. Raises: UserError when files are missing or damaged."""

    def check_data(self, run: Any) -> None:
        """Checks the names of the data's files, without reading them. Raises: UserError when some are missing."""

    def describe(self, data: Any) -> dict[str, Any]:
        """Returns the facts about the data that `sorted-ds prepare --json` prints."""

    def summary(self, data: Any) -> str:
        """Returns a few words about what the data holds."""

    def notes(self, data: Any) -> list[str]:
        """Returns lines about what was read, what was left out, and what the user should be warned of."""

    def baseline(self, data: Any) -> Baseline | None:
        """Returns the loss of a trivial model of this data, or None."""

    def rows(self, data: Any, row_tokens: int, is_validation: bool, isolate: bool = False) -> Rows:
        """Returns the training or the validation rows. Raises: UserError when there are none.

        `isolate`: whether the documents of a row must not see each other.
        """

    def collate(self, rows: Sequence[Any], size: int, row_tokens: int) -> MicroBatch:
        """Returns a micro-batch of `size` rows: these rows, and padding rows without targets."""

    def pieces(self, data: Any, row: Any) -> list[Piece]:
        """Returns what a person sees of a row."""

    # Model

    def config_fields(self, run: Any) -> dict[str, Any]:
        """Returns the keys of a new model's config that follow from the data."""

    def check_config(self, run: Any, config: PreTrainedConfig) -> None:
        """Checks that the model can be trained on the data. Raises: UserError when it cannot."""

    def check_teacher(self, run: Any, source: Path) -> None:
        """Checks that another model can teach on the run's data. Raises: UserError when it cannot.

        `source`: the Hugging Face directory of the teacher.
        """

    def warnings(self, run: Any, config: PreTrainedConfig, generation: GenerationConfig | None) -> list[str]:
        """Returns what does not fit together of the model and the data, although it can be trained.

        `generation`: the generation config of the checkpoint that training begins with, if it has one.
        """

    def attach(self, model: PreTrainedModel, family: Family) -> None:
        """Adds to the model's head what the loss needs, in place. Names and weights stay as they are."""

    def states(self, model: PreTrainedModel, family: Family, batch: Batch) -> Tensor:
        """Returns what the model's current sub-network gives to its head. A teacher hands this to its students.

        The first dimension counts rows. For a pass with exits it has the rows of each exit, the shallowest first.
        """

    def sums(self, model: PreTrainedModel, family: Family, states: Tensor, batch: Batch, with_metrics: bool) -> Sums:
        """Returns the sums of a batch for the states of its pass; only the loss unless `with_metrics`."""

    def weighted_loss(
        self,
        model: PreTrainedModel,
        family: Family,
        states: Tensor,
        batch: Batch,
        terms: Terms,
        teacher: Teacher | None,
    ) -> tuple[Tensor, Parts]:
        """Returns the weighted loss of a pass with exits, a teacher or both, and its parts, summed over targets."""

    # Export

    def usage(self, folder: Path, name: str, auto_class: str) -> str:
        """Returns Python code that loads the exported model and uses it, for the model card.

        `folder`: where the model was written; `name`: the name that the folder will get.
        """

    def write_processor(self, data: Any, folder: Path) -> None:
        """Writes the tokenizer or image processor, which turns a user's input into a batch, beside the model."""

    def copy_processor(self, source: Path, folder: Path) -> None:
        """Copies the tokenizer or image processor from the directory of one model to that of another."""

    def probe(self, folder: Path, config: PreTrainedConfig) -> Batch:
        """Returns inputs on which two models that should be equal are compared.

        `folder`: the directory with the tokenizer or image processor.
        """

    def logits(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Returns the logits of a nested or plain model for a probe."""


@dataclass(frozen=True)
class Outcome:
    """What came of a pass that trains or teaches."""

    loss: Tensor | None
    """The loss with a gradient, in nats, summed over targets. A teacher has none."""
    states: Tensor | None = None
    """What the head got, without a gradient, for students on the same rows. Only with a teacher or exits."""
    parts: Parts | None = None
    """The parts of a weighted loss."""

    @property
    def nll(self) -> Tensor:
        """The loss of the labels at the pass's own end, in nats, summed over targets, without a gradient."""
        assert self.loss is not None
        return self.loss.detach() if self.parts is None else self.parts.nll[-1]


class SummedLoss(nn.Module):
    """A model that returns its summed loss, as the engine trains it. Names of parameters start with `model.`."""

    def __init__(self, model: PreTrainedModel, task: Task, family: Family, terms: Terms | None = None):
        """With `terms` the loss is weighted."""
        super().__init__()
        task.attach(model, family)
        self.model, self.task, self.family, self.terms = model, task, family, terms

    def forward(
        self, mode: Mode = "train", teacher: Teacher | None = None, **batch: Tensor
    ) -> Tensor | tuple[Tensor, Tensor, Parts] | Sums:
        """Returns what the mode asks for, for the current sub-network.

        `train`: the summed loss; with `terms` also the states of the pass's own end, without a gradient, and the parts
        of the loss. `teach`: the states. `evaluate`: all sums with their counts.
        """
        states = self.task.states(self.model, self.family, batch)
        if mode == "teach":
            return states
        if mode == "evaluate" or self.terms is None:
            sums = self.task.sums(self.model, self.family, states, batch, with_metrics=mode == "evaluate")
            return sums if mode == "evaluate" else sums[LOSS][0]
        loss, parts = self.task.weighted_loss(self.model, self.family, states, batch, self.terms, teacher)
        num_rows = len(next(iter(batch.values())))
        return loss, states.detach()[-num_rows:], parts


def mean_of(name: str) -> Callable[[Totals], float]:
    """Returns a function for `Metric.value` that computes the mean of a sum."""
    return lambda totals: totals[name][0] / totals[name][1]
