"""`Task`: the one object that knows what a network is trained for.

In: a run's settings. Out: what a micro-batch holds, how a forward pass becomes sums, which metrics are shown, and
how the data is prepared. The loop, the engine, the checkpoints, the monitor and `eval` do not know which task runs. A
new task is one file beside `causal_lm.py` and an entry in `TASKS` (tasks/__init__.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sorted_ds.data.loader import Batch, MicroBatch, Rows
from sorted_ds.nested.family import Family

LOSS = "loss"
"""The name of the sum that is trained, in nats, and of the metric that is its mean."""

Sums = dict[str, tuple[Tensor, Tensor]]
"""Name -> (sum, count) over a batch: `loss` first. Means are made of totals over all batches and ranks."""
Totals = Mapping[str, tuple[float, float]]
"""`Sums` of all batches and ranks together."""
Report = Callable[[float, float], None]
"""Hears of progress: how much is done, and how much there is."""


@dataclass(frozen=True)
class Metric:
    """A number that tables, curves and cards show for each sub-network."""

    name: str
    title: str
    """The head of a table's column, with the unit."""
    value: Callable[[Totals], float]
    text: Callable[[float], str]
    """How a value is printed."""


@dataclass(frozen=True)
class Baseline:
    """The loss of something trivial, to compare with."""

    name: str
    loss: float


class Prepared(Protocol):
    """A run's data on disk."""

    @property
    def key(self) -> str:
        """The content key: equal keys, equal data."""

    @property
    def folder(self) -> Path:
        """Where the data lies."""


class Task(Protocol):
    """What a network is trained for."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What is shown; the first is the loss."""

    # Data

    def prepare(self, run: Any, report: Report) -> Prepared:
        """The run's data on disk, made where it is not there yet. Raises: UserError when it cannot be used."""

    def find_prepared(self, run: Any) -> Prepared:
        """The run's data where it is on disk. Raises: UserError otherwise."""

    def open_prepared(self, folder: Path) -> Prepared:
        """The data of a folder. Raises: UserError when files are missing or damaged."""

    def check_data(self, run: Any) -> None:
        """Raises: UserError for data that `prepare` would refuse, as far as a look at the names of files tells."""

    def describe(self, data: Any) -> dict[str, Any]:
        """Facts about the data, for `sorted-ds prepare --json`."""

    def summary(self, data: Any) -> str:
        """What the data holds, in a few words."""

    def baseline(self, data: Any) -> Baseline | None:
        """Something trivial that the data allows to compare with."""

    def rows(self, data: Any, row_tokens: int, is_validation: bool) -> Rows:
        """The rows of one side of the data. Raises: UserError when there are none."""

    def collate(self, rows: Sequence[Any], size: int, row_tokens: int) -> MicroBatch:
        """A micro-batch of these rows, filled up to `size` by rows without targets."""

    # Model

    def config_fields(self, run: Any) -> dict[str, Any]:
        """Keys of a new model's config that follow from the data."""

    def check_config(self, run: Any, config: PreTrainedConfig) -> None:
        """Raises: UserError when data and model do not fit."""

    def attach(self, model: PreTrainedModel, family: Family) -> None:
        """Gives the model's head what the loss needs, in place. Names and weights stay."""

    def sums(self, model: PreTrainedModel, family: Family, batch: Batch, with_metrics: bool) -> Sums:
        """The sums of a batch on the sub-network that runs now; without metrics the loss alone."""

    # Export

    def write_processor(self, data: Any, folder: Path) -> None:
        """Writes what turns a user's input into a batch (tokenizer, image processor) beside the model."""

    def copy_processor(self, source: Path, folder: Path) -> None:
        """Copies it from one model's directory to another's."""

    def probe(self, folder: Path, config: PreTrainedConfig) -> Batch:
        """Inputs on which two models that should be equal are compared, made with the folder's processor."""

    def logits(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """The plain model's outputs for a probe."""


class SummedLoss(nn.Module):
    """What the engine trains: a model that ends in its summed loss. Parameter names start with `model.`."""

    def __init__(self, model: PreTrainedModel, task: Task, family: Family):
        super().__init__()
        task.attach(model, family)
        self.model, self.task, self.family = model, task, family

    def forward(self, with_metrics: bool = False, **batch: Tensor) -> Tensor | Sums:
        """The summed loss of a micro-batch on the sub-network that runs now; or all sums, with their counts."""
        sums = self.task.sums(self.model, self.family, batch, with_metrics)
        return sums if with_metrics else sums[LOSS][0]


def mean_of(name: str) -> Callable[[Totals], float]:
    """The mean of a sum, for a `Metric`."""
    return lambda totals: totals[name][0] / totals[name][1]
