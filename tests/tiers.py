"""A pytest plugin that counts the tests of the second tier that were left out, and says how to run them. It refuses a
test with the mark `ci` that is not of the second tier.

What belongs to which tier: CONTRIBUTING.md, "Tests".
"""

from collections.abc import Sequence

import pytest


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
