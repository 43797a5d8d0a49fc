"""Says which row stands at a position of the run: of one source of rows, or of a mixture of several.

In: the seed, the number of rows of each source and, for a mixture, weights that may change at given steps. Out: the row
at a position, where positions count the rows of all steps from 0. Nothing is on disk: the order is a pure function of
(seed, position), so it does not depend on the number of ranks, and a run goes on anywhere.

After any step, the rows that a source has had so far in a phase are within one of its share. This is a schedule with
deadlines: row j of a source with share w belongs between the rows j / w and (j + 1) / w of the phase, and of the rows
that may come the one with the earliest deadline comes next (Baruah et al. 1996, "Proportionate progress").
"""

import bisect
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol

import numpy as np

from sorted_ds.base.errors import UserError
from sorted_ds.base.shuffle import Shuffle

LONGEST_PERIOD = 100_000
"""The largest number of rows after which a mixture may repeat its sources."""


class Order(Protocol):
    """Which row stands where."""

    def row_at(self, position: int) -> int:
        """Returns the number of the row at a position."""


@dataclass(frozen=True)
class Shuffled:
    """The rows of one source. An epoch has each row once, and each epoch has another order."""

    num_rows: int
    seed: int
    name: str = ""

    def row_at(self, position: int) -> int:
        """Returns the number of the row at a position."""
        epoch, position_in_epoch = divmod(position, self.num_rows)
        key = (self.seed, "rows", self.name, epoch) if self.name else (self.seed, "rows", epoch)
        return Shuffle(self.num_rows, key)(position_in_epoch)


class JoinedRows:
    """The rows of several sources, one after the other."""

    def __init__(self, sources: Mapping[str, Any]):
        self.sources = dict(sources)
        self.starts = list(accumulate(map(len, self.sources.values()), initial=0))
        """The number of the first row of each source, and the number of all rows."""

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, row: int) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        number = self._number(row)
        return list(self.sources.values())[number][row - self.starts[number]]

    def name_of(self, row: int) -> str:
        """Returns the name of the source of a row."""
        return list(self.sources)[self._number(row)]

    def _number(self, row: int) -> int:
        return bisect.bisect_right(self.starts, row) - 1


class Pattern:
    """Which source each row of a phase is from. It repeats after a period."""

    def __init__(self, weights: Sequence[float]):
        """`weights`: of each source, one of them above zero. Raises: UserError when the period would be too long."""
        exact = [Fraction(str(weight)) for weight in weights]
        denominator = math.lcm(*(weight.denominator for weight in exact))
        counts = [int(weight * denominator) for weight in exact]
        divisor = math.gcd(*counts)
        self.counts = tuple(count // divisor for count in counts)
        """The rows of each source in a period."""
        self.period = sum(self.counts)
        if self.period > LONGEST_PERIOD:
            raise UserError(
                f"data: the weights {', '.join(f'{weight:g}' for weight in weights)} repeat after {self.period:,} rows "
                f"only, and a mixture may take {LONGEST_PERIOD:,}. Write them with fewer digits, like 0.7 and 0.3."
            )

    @cached_property
    def sources(self) -> np.ndarray:
        """The source of each row of a period. Shape [period]."""
        found = np.empty(self.period, np.int64)
        ready: list[tuple[int, int, int]] = []  # deadline, source, row of the source
        # The first row of the period that it may be, source, row of the source.
        waiting = [(0, number, 0) for number, count in enumerate(self.counts) if count]
        for place in range(self.period):
            while waiting and waiting[0][0] <= place:
                _, number, row = heapq.heappop(waiting)
                heapq.heappush(ready, (-(-(row + 1) * self.period // self.counts[number]), number, row))
            _, number, row = heapq.heappop(ready)
            found[place] = number
            if row + 1 < self.counts[number]:
                heapq.heappush(waiting, ((row + 1) * self.period // self.counts[number], number, row + 1))
        return found

    @cached_property
    def _places(self) -> list[np.ndarray]:
        """For each source, where in the period its rows are, ascending."""
        return [np.flatnonzero(self.sources == number) for number in range(len(self.counts))]

    def before(self, row: int, source: int) -> int:
        """Returns how many of the first `row` rows of the phase are of a source."""
        periods, place = divmod(row, self.period)
        return periods * self.counts[source] + int(np.searchsorted(self._places[source], place))


@dataclass(frozen=True)
class Mixture:
    """The rows of several sources, as `JoinedRows` numbers them."""

    num_rows: Mapping[str, int]
    """The number of rows of each source, by name."""
    weights: Mapping[int, Sequence[float]]
    """The weights of the sources, in the order of `num_rows`, by the first step at which they hold, from step 0 on."""
    seed: int
    step_rows: int

    def row_at(self, position: int) -> int:
        """Returns the number of the row at a position.

        Within a step the rows are shuffled, so that no sub-network always gets the rows of the same source.
        """
        step, place = divmod(position, self.step_rows)
        phase = bisect.bisect_right(self._phases, step) - 1
        shuffled = Shuffle(self.step_rows, (self.seed, "mixture", step))(place)
        row = (step - self._phases[phase]) * self.step_rows + shuffled
        pattern = self._patterns[phase]
        source = int(pattern.sources[row % pattern.period])
        before = self._before[phase][source] + pattern.before(row, source)
        name = list(self.num_rows)[source]
        return self._starts[source] + Shuffled(self.num_rows[name], self.seed, name).row_at(before)

    def rows_of(self, steps: int) -> dict[str, int]:
        """Returns how many rows of each source the first steps have."""
        phase = max(0, bisect.bisect_left(self._phases, steps) - 1)
        rows, pattern = (steps - self._phases[phase]) * self.step_rows, self._patterns[phase]
        earlier = self._before[phase]
        return {name: earlier[source] + pattern.before(rows, source) for source, name in enumerate(self.num_rows)}

    @cached_property
    def _phases(self) -> list[int]:
        return sorted(self.weights)

    @cached_property
    def _patterns(self) -> list[Pattern]:
        return [Pattern(self.weights[step]) for step in self._phases]

    @cached_property
    def _starts(self) -> list[int]:
        return list(accumulate(self.num_rows.values(), initial=0))

    @cached_property
    def _before(self) -> list[list[int]]:
        """How many rows of each source come before each phase."""
        found = [[0] * len(self.num_rows)]
        for pattern, first, last in zip(self._patterns, self._phases, self._phases[1:], strict=False):
            rows = (last - first) * self.step_rows
            found.append([count + pattern.before(rows, source) for source, count in enumerate(found[-1])])
        return found
