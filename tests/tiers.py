"""Cases whose tests belong to two tiers, and a pytest plugin that says what was left out.

The plugin counts the tests of the second tier that were not run, and says how to run them. It refuses a test with the
mark `ci` that is not of the second tier. What belongs to which tier: CONTRIBUTING.md, "Tests".
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

MARKS: dict[str, tuple[pytest.MarkDecorator, ...]] = {
    "first": (),
    "ci": (pytest.mark.long, pytest.mark.ci),
    "second": (pytest.mark.long,),
}
"""The marks of a tier's tests. Those of `ci` are of the second tier, and CI runs them too."""


@dataclass(frozen=True)
class Tiers:
    """Cases of which each tier trains its own in one start. A case is a number, or has a `name`."""

    cases: Sequence[Any]
    first: Sequence[Any]
    """The cases of the first tier."""
    in_ci: Sequence[Any] = ()
    """The cases of the second tier that CI runs too."""

    def each(self, cases: Iterable[Any], argument: str = "case") -> pytest.MarkDecorator:
        """Returns the mark that runs a test with each case, in the case's tier, as this argument."""
        values = [pytest.param(one, id=getattr(one, "name", str(one)), marks=MARKS[self._tier(one)]) for one in cases]
        return pytest.mark.parametrize(argument, values)

    def _tier(self, case: Any) -> str:
        if case in self.first:
            return "first"
        return "ci" if case in self.in_ci else "second"

    def started(
        self, start: Callable[[list[Any], Path], dict], tmp_path_factory: pytest.TempPathFactory
    ) -> Callable[[Any], dict]:
        """Returns a function from a case to what `start` returns for all cases with its marks. It starts them once."""

        @cache
        def results(tier: str) -> dict:
            return start([case for case in self.cases if self._tier(case) == tier], tmp_path_factory.mktemp(tier))

        return lambda case: results(self._tier(case))


class LeftOut:
    """`number` tests of the second tier were not run. With `-n` every worker finds the same ones."""

    def __init__(self, config: pytest.Config):
        self.config, self.number = config, 0

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: Sequence[pytest.Item]) -> None:
        for item in items:
            if item.get_closest_marker("ci") and not item.get_closest_marker("long"):
                raise pytest.UsageError(f"{item.nodeid} has the mark 'ci'. Add the mark 'long'.")

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        self.number += sum(item.get_closest_marker("long") is not None for item in items)

    def pytest_sessionfinish(self) -> None:
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["left_out"] = self.number

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node) -> None:
        self.number = getattr(node, "workeroutput", {}).get("left_out", self.number)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.number:
            terminalreporter.write_line(f"{self.number} tests of the second tier were not run: make test-all")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(LeftOut(config), "left_out")
