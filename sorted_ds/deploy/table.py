"""Formats numbers for people, and builds the tables that commands print.

In: measured or planned sub-networks. Out: `rich` tables, and numbers like 1.24M.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from sorted_ds.deploy.model_dir import Measured
from sorted_ds.deploy.score import Score
from sorted_ds.deploy.speed import Setting, Speed

if TYPE_CHECKING:
    from sorted_ds.tasks import Metric

MIB = 2**20
WIDTH_IN_A_FILE = 120
"""The fewest characters of a line that is not printed on a terminal. Every table fits."""

UNITS = (("P", 1e15), ("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3))
COST_COLUMNS = ("params", "non-emb.", "FLOPs/tok", "KV B/tok")
"""The titles of the columns of `cost_cells`."""


class Costs(Protocol):
    """What a sub-network costs."""

    @property
    def parameters(self) -> int: ...
    @property
    def non_embedding_parameters(self) -> int: ...
    @property
    def flops_per_token(self) -> int: ...
    @property
    def kv_bytes_per_token(self) -> int: ...


def console() -> Console:
    """Returns a console for standard output, which is wide enough for every column if it is not a terminal."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=max(out.width, WIDTH_IN_A_FILE))


def human(number: float) -> str:
    """Returns the number with three digits and a unit: 1.24M, 350k."""
    for unit, size in UNITS:
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def cost_cells(costs: Costs) -> tuple[str, ...]:
    """Returns the cells of the columns `COST_COLUMNS`."""
    return (
        human(costs.parameters),
        human(costs.non_embedding_parameters),
        human(costs.flops_per_token),
        f"{costs.kv_bytes_per_token:,}",
    )


def measured_table(
    rows: Sequence[Measured], metrics: Sequence["Metric"], baseline: Mapping[str, float] | None
) -> Group:
    """Returns a table with a line for each row, in the order of `rows`. The last line is the loss of the baseline.

    If speeds were measured, those of one setting are shown: batch 1 and context 512, or the first one.
    """
    setting = shown_setting(rows)
    speeds = () if setting is None else SPEED_COLUMNS
    table = numbers_table("sub-network", *(metric.title for metric in metrics), *COST_COLUMNS, *speeds)
    for row in rows:
        metric_cells = (metric.text(row.metrics[metric.name]) for metric in metrics)
        speed_cells = () if setting is None else _speed_cells(row.speed(setting))
        table.add_row(shown_name(row), *metric_cells, *cost_cells(row), *speed_cells)
    table.add_section()
    for name, loss in (baseline or {}).items():
        table.add_row(name, metrics[0].text(loss))
    return _with_notes(table, _notes(rows, setting))


SPEED_COLUMNS = ("ms/tok", "MiB")
"""The titles of the columns of `_speed_cells`."""


def shown_setting(rows: Sequence[Measured]) -> Setting | None:
    """Returns the setting whose speeds are shown, or None if there are no speeds: most rows have it."""
    counts = Counter(speed.setting for row in rows for speed in row.speeds)
    return max(counts, key=lambda setting: (counts[setting], setting == Setting()), default=None)


def shown_name(row: Measured) -> str:
    """Returns the name, with a star if the sub-network was never trained."""
    return row.subnet if row.is_trained else f"{row.subnet} *"


def _speed_cells(speed: Speed | None) -> tuple[str, str]:
    return ("", "") if speed is None else (_time(speed, speed.decode_ms), _mib(speed.memory_bytes))


def _notes(rows: Sequence[Measured], setting: Setting | None) -> list[str]:
    """Returns what must be said under a table."""
    stars = ["* never trained"] if any(not row.is_trained for row in rows) else []
    if setting is None:
        return stars
    speeds = [speed for row in rows if (speed := row.speed(setting)) is not None]
    predicted = [speed for speed in speeds if not speed.is_measured]
    about = f"ms/tok: one decoded token of each row; MiB: weights and cache; both for {setting}"
    if not predicted:
        return [*stars, about]
    return [
        *stars,
        about,
        f"~ predicted from the {len(speeds) - len(predicted)} that were measured. When each of these is predicted from "
        f"the others, half of the times are off by at most {predicted[0].median_error:.0%}, and all by at most "
        f"{predicted[0].largest_error:.0%}.",
    ]


def speed_table(rows: Sequence[Measured], setting: Setting) -> Group:
    """Returns a table of the speeds for one setting, with a line for each row that has one."""
    titles = ("prefill ms", "spread", "decode ms", "spread", "tokens/s", "MiB", "cache MiB")
    table = numbers_table("sub-network", *titles)
    for row in rows:
        if (speed := row.speed(setting)) is not None:
            table.add_row(
                shown_name(row),
                _time(speed, speed.prefill_ms),
                _spread(speed.prefill_spread_ms),
                _time(speed, speed.decode_ms),
                _spread(speed.decode_spread_ms),
                f"{speed.tokens_per_second:,.1f}",
                _mib(speed.memory_bytes),
                _mib(speed.cache_bytes),
            )
    return _with_notes(table, [f"{setting}. Times are medians, and spreads interquartile ranges."])


def score_table(rows: Sequence[Measured], task: str) -> Group:
    """Returns a table of the scores in a task, with a line for each row that has some."""
    scored = [(row, {score.metric: score for score in row.scores if score.task == task}) for row in rows]
    scored = [(row, scores) for row, scores in scored if scores]
    metrics = sorted({metric for _, scores in scored for metric in scores})
    table = numbers_table("sub-network", *(title for metric in metrics for title in (metric, "±")))
    for row, scores in scored:
        table.add_row(shown_name(row), *(cell for metric in metrics for cell in _score_cells(scores.get(metric))))
    one = next(iter(scored[0][1].values()))
    shots = "" if one.num_fewshot is None else f", {one.num_fewshot} examples before each"
    chat = ", in the chat template" if one.chat else ""
    about = f"{task}: {one.num_samples} questions{shots}{chat}, lm_eval {one.lm_eval}. ±: standard error."
    return _with_notes(table, [about])


def _with_notes(table: Table, notes: Sequence[str]) -> Group:
    """Returns the table with notes under it, which may be wider than the table."""
    return Group(table, *(Text(note) for note in notes))


def _score_cells(score: Score | None) -> tuple[str, str]:
    if score is None:
        return "", ""
    return f"{score.value:.4f}", "" if score.stderr is None else f"{score.stderr:.4f}"


def _time(speed: Speed, milliseconds: float) -> str:
    return f"{'' if speed.is_measured else '~'}{milliseconds:.2f}"


def _spread(milliseconds: float | None) -> str:
    return "" if milliseconds is None else f"{milliseconds:.2f}"


def _mib(number: int) -> str:
    return f"{number / MIB:,.1f}"


def numbers_table(first: str, *others: str) -> Table:
    """Returns an empty table with a column of names and columns of numbers."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for title in others:
        table.add_column(title, justify="right", no_wrap=True)
    return table
