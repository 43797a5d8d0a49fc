"""Prints how far training is from plain single-process PyTorch: `make bench`. Two gloo ranks, minutes.

Stage x precision x optimizer, each part of the fix off. Largest difference of a weight after six steps.
"""

import tempfile
from pathlib import Path

from tests.engine.test_exact import print_table

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print_table(Path(folder) / "exactness")
