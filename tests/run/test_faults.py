"""Five random kills of one real run, and a damaged checkpoint: it ends as the uninterrupted run does, bit for bit.

`python -m benchmarks.faults` does it a hundred times, and in Slurm.
"""

import random
import time

import pytest

from benchmarks.injuries import fresh
from benchmarks.lives import MOMENTS, live, settings
from tests import launched
from tests.runs import run_file

STEPS = 400
KINDS = ["kill -9 of a rank", "a flipped bit", "kill -9 of all ranks", "kill -9 of a launcher", "kill -9 of everything"]


@pytest.mark.long
def test_five_kills_at_random_moments_cost_nothing(tmp_path):
    original = run_file(tmp_path / "original")
    launched.train_by_command(original, *settings(STEPS), "train.hang_minutes=30")
    seed = time.time_ns()
    chance = random.Random(seed)
    kinds = [*KINDS, "kill -9 of a rank"]
    chance.shuffle(kinds)
    moments = [moment for moment in MOMENTS if moment != "end"]  # more could not follow
    faults = live(original, fresh(original, tmp_path / "life"), kinds, chance, STEPS, moments)
    told = "\n".join(map(str, [f"seed {seed}", *faults]))
    assert len(faults) >= 5, told
    assert all(fault.cost_nothing for fault in faults), told
    assert all(fault.seconds_to_end < 60 for fault in faults), told
