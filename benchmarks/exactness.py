"""Prints how far training is from plain single-process PyTorch: `make bench`. Two gloo ranks, minutes.

Stage x precision x optimizer, each part of the fix off, and resuming on other numbers of ranks. Largest difference of a
weight after six steps (resume: after ten, stopped at five).
"""

import tempfile
from pathlib import Path

from tests import exactness, test_checkpoint
from tests.spawn import on_ranks
from tests.test_engine_exact import print_table

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print_table(Path(folder) / "exactness")
        whole = on_ranks(2, test_checkpoint.train, exactness.Case(2), f"{folder}/run", 0, 10, folder=Path(folder))
        for change, (first, second) in test_checkpoint.CHANGES.items():
            weights = test_checkpoint.continued(Path(folder) / change, first, second)
            print(f"{'resumed: ' + change:75s} {exactness.largest_difference(weights, whole):.1e}")
