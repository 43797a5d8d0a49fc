"""Draws pareto.png, which shows the loss and the size of each measured sub-network.

In: the measured table. On disk: one picture with a point for each sub-network, validation loss against parameters. The
first axis (depth) gives the colour, the second (attention groups) the shape, the last (feed-forward channels) the area.
A line is the Pareto frontier.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from sorted_ds.base.files import replaced
from sorted_ds.deploy.model_dir import PARETO_PNG, Measured
from sorted_ds.deploy.select import frontier
from sorted_ds.deploy.table import human
from sorted_ds.space import AXES, SubNet

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">")
SMALLEST_AREA, LARGEST_AREA = 55.0, 165.0
DARKEST, BRIGHTEST = 0.05, 0.88
"""The part of the viridis colours that is used, because their yellow end is too light on white."""
LEGEND_ENTRIES = 8
"""The legend shows at most this many sizes of an axis."""
BASELINE_MARGIN = 0.6
"""The baseline is a line if it is above the losses by at most this fraction of their range; otherwise it is a text."""
INK, PALE = "#222222", "#8a8a8a"


def draw_pareto(table: Sequence[Measured], baseline: Mapping[str, float] | None, space_size: int, folder: Path) -> Path:
    """Writes `folder`/pareto.png, 1800 x 1125 pixels, and returns its path.

    `space_size`: the number of sub-networks in the space, of which the table may hold a part.
    """
    figure = Figure(figsize=(12, 7.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    trained = [row for row in table if row.is_trained]
    style = _Style([SubNet.parse(row.subnet) for row in table])
    for row in sorted(table, key=lambda row: -row.parameters):
        subnet = SubNet.parse(row.subnet)
        axes.scatter(
            row.parameters,
            row.loss,
            s=style.area(subnet),
            facecolors=style.color(subnet) if row.is_trained else "white",
            marker=style.marker(subnet),
            edgecolors="white" if row.is_trained else style.color(subnet),
            linewidths=0.8 if row.is_trained else 1.6,
            zorder=3,
        )
    _draw_frontier(axes, table)
    _annotate_ends(axes, table, "" if len(trained) == space_size else " measured")
    _label(axes, table)
    of_all = "" if len(trained) == space_size else f" of {space_size}"
    title = f"{len(trained)}{of_all} measured sub-networks of one network"
    axes.set_title(title, loc="left", fontsize=15, fontweight="bold", color=INK, pad=26)
    _draw_baseline(axes, table, baseline or {})
    never = [] if len(trained) == len(table) else [_hollow(f"{len(table) - len(trained)} never trained")]
    figure.legend(
        handles=[*style.handles(), *never],
        loc="outside right upper",
        frameon=False,
        fontsize=11,
        labelcolor=INK,
        labelspacing=0.65,
    )
    path = folder / PARETO_PNG
    with replaced(path) as hidden:
        figure.savefig(hidden, format="png")
    return path


class _Style:
    """The colour, shape and area of points: from the first axis of a sub-network, its second, and its last."""

    def __init__(self, subnets: Sequence[SubNet]):
        letters = subnets[0].axes
        self._colored, self._sized = letters[0], letters[-1]
        self._shaped = letters[1] if len(letters) > 2 else ""
        self._sizes = {letter: sorted({subnet[letter] for subnet in subnets}) for letter in letters}

    def _share(self, letter: str, size: int) -> float:
        """Returns the rank of a size among those of its axis, from 0 to 1."""
        return self._sizes[letter].index(size) / max(1, len(self._sizes[letter]) - 1)

    def color(self, subnet: SubNet) -> tuple[float, float, float, float]:
        return self._color(subnet[self._colored])

    def _color(self, size: int) -> tuple[float, float, float, float]:
        return colormaps["viridis"](DARKEST + self._share(self._colored, size) * (BRIGHTEST - DARKEST))

    def marker(self, subnet: SubNet) -> str:
        return self._marker(subnet[self._shaped]) if self._shaped else MARKERS[0]

    def _marker(self, size: int) -> str:
        return MARKERS[self._sizes[self._shaped].index(size) % len(MARKERS)]

    def area(self, subnet: SubNet) -> float:
        return self._area(subnet[self._sized])

    def _area(self, size: int) -> float:
        return SMALLEST_AREA + self._share(self._sized, size) * (LARGEST_AREA - SMALLEST_AREA)

    def handles(self) -> list[Line2D]:
        entries: list[Line2D] = []
        for letter, sizes in self._sizes.items():
            entries += [_title(AXES[letter].label), *(self._entry(letter, size) for size in _some(sizes)), _title("")]
        return [*entries, Line2D([], [], color=INK, linewidth=1.2, alpha=0.6, label="Pareto frontier")]

    def _entry(self, letter: str, size: int) -> Line2D:
        if letter == self._colored:
            return _dot(f"{size:,}", self._color(size))
        if letter == self._shaped:
            return _dot(f"{size:,}", PALE, self._marker(size))
        return _dot(f"{size:,}", PALE, "o", self._area(size) if letter == self._sized else 90.0)


def _some(sizes: list[int]) -> list[int]:
    """Returns at most `LEGEND_ENTRIES` sizes, among them the first and the last."""
    if len(sizes) <= LEGEND_ENTRIES:
        return sizes
    return [sizes[round(k * (len(sizes) - 1) / (LEGEND_ENTRIES - 1))] for k in range(LEGEND_ENTRIES)]


def _dot(label: str, color, marker: str = "o", area: float = 90.0) -> Line2D:
    style = {"linestyle": "", "markeredgecolor": "white", "markersize": area**0.5}
    return Line2D([], [], color=color, marker=marker, label=label, **style)


def _hollow(label: str) -> Line2D:
    return Line2D([], [], color=PALE, marker="o", label=label, linestyle="", markerfacecolor="white", markersize=9.5)


def _title(text: str) -> Line2D:
    label = "$\\bf{" + text.replace(" ", "\\ ") + "}$" if text else ""
    return Line2D([], [], linestyle="", label=label)


def _draw_frontier(axes: Axes, table: Sequence[Measured]) -> None:
    best = frontier(table)
    axes.plot([row.parameters for row in best], [row.loss for row in best], color=INK, linewidth=1.2, alpha=0.6)


def _annotate_ends(axes: Axes, table: Sequence[Measured], measured: str) -> None:
    """Labels the largest and the smallest sub-network. The labels stand inside the axes, away from the points."""
    full, smallest = max(table, key=lambda row: row.parameters), min(table, key=lambda row: row.parameters)
    ends = (
        (full, "largest measured" if measured else "full", (-14, -34), "right"),
        (smallest, f"smallest{measured}", (16, 26), "left"),
    )
    for row, word, offset, align in ends if full is not smallest else ends[:1]:
        axes.annotate(
            f"{word}: {row.subnet}\n{row.loss:.3f} nats, {human(row.parameters)} parameters",
            (row.parameters, row.loss),
            xytext=offset,
            textcoords="offset points",
            ha=align,
            va="center",
            fontsize=11,
            color=INK,
            arrowprops={"arrowstyle": "-", "color": PALE, "linewidth": 0.8, "shrinkB": 6},
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.6, "pad": 1.5},
            zorder=4,
        )


def _label(axes: Axes, table: Sequence[Measured]) -> None:
    axes.set_xscale("log")
    sizes, losses = [row.parameters for row in table], [row.loss for row in table]
    reach = max(sizes) / min(sizes)
    axes.set_xlim(min(sizes) / reach**0.06 / 1.02, max(sizes) * reach**0.06 * 1.02)
    low, high = min(losses), max(losses)
    margin = max(high - low, 0.02 * high) * 0.14
    axes.set_ylim(low - margin, high + margin)
    subs = (1, 2, 3, 5, 7) if reach > 5 else (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)
    axes.xaxis.set_major_locator(LogLocator(subs=subs if reach < 100 else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(MaxNLocator(8))
    axes.set_xlabel("parameters (log scale)", fontsize=13, color=INK)
    axes.set_ylabel("validation loss (nats per target)", fontsize=13, color=INK)
    axes.grid(color="#e6e6e6", linewidth=0.8, which="major")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=11, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_baseline(axes: Axes, table: Sequence[Measured], baseline: Mapping[str, float]) -> None:
    """Draws the baseline's loss as a line if it is near the points; otherwise the text under the title states it."""
    caption = f"{table[0].num_targets:,} validation targets, the same for all"
    low, high = axes.get_ylim()
    for name, loss in baseline.items():
        if high < loss <= high + BASELINE_MARGIN * (high - low):
            axes.set_ylim(low, loss + 0.05 * (high - low))
            axes.axhline(loss, color=PALE, linestyle="--", linewidth=1.2)
            where = ((0.99, loss), (0, -14), ("axes fraction", "data"), "offset points")
            axes.annotate(f"{name}: {loss:.3f}", *where, ha="right")
        else:
            caption += f"; {name}: {loss:.3f} nats (not drawn)"
    axes.text(0, 1.015, caption, transform=axes.transAxes, fontsize=11.5, color="#555555")
