"""Measures how far a run that continues in another mode is from one that does not stop.

`python -m benchmarks.elastic` takes about 10 minutes. It trains three steps in the mode of a row's source, and three
more on 1 to 4 ranks, at every ZeRO stage, with several micro-batch sizes. It compares the result with six steps on two
ranks at stage 2, and fails if rows or sampled sub-networks differ. It prints the largest difference of the weights
(AdamW at 0.01), and that of the moments relative to the largest moment.
"""

import tempfile
from pathlib import Path

from tests import exactness, resumed
from tests.checkpoint.test_checkpoint import SOURCES, train_first_half
from tests.exactness import MOMENTS, Case
from tests.resumed import HALF, STEPS, Leg
from tests.spawn import on_ranks

MICRO_BATCH_ROWS = (1, 2, 5)
LEGS = [Leg(Case(stage), rows) for stage in (0, 1, 2, 3) for rows in MICRO_BATCH_ROWS]


def relative_difference(found: dict, expected: dict) -> float:
    """Returns the largest difference relative to the largest expected value."""
    largest = max(float(value.abs().max()) for value in expected.values())
    return exactness.largest_difference(found, expected) / largest


def main() -> None:
    print("| saved at | continued on | stage | micro-batch rows | weights | moments |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = on_ranks(2, resumed.train, Leg(), f"{name}/whole", 0, STEPS, folder=folder / "ranks")
        for source, (num_ranks, leg) in SOURCES.items():
            on_ranks(num_ranks, train_first_half, [leg], [f"{name}/{source}"], folder=folder / "ranks")
        sources = {source: f"{name}/{source}" for source in SOURCES}
        for num_ranks in (1, 2, 3, 4):
            arguments = (sources, LEGS, f"{name}/on{num_ranks}")
            results = on_ranks(num_ranks, resumed.continue_each, *arguments, folder=folder / "ranks", hang_seconds=1200)
            for source in sources:
                for leg in LEGS:
                    found = results[source, leg.name]
                    assert found["rows"] == expected["rows"][HALF:], (source, leg.name)
                    assert found["samples"] == expected["samples"][HALF:], (source, leg.name)
                    weights = exactness.largest_difference(found["weights"], expected["weights"])
                    moments = max(relative_difference(found[kind], expected[kind]) for kind in MOMENTS)
                    ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"
                    cells = (source, ranks, leg.case.stage, leg.micro_batch_rows, f"{weights:.1e}", f"{moments:.1e}")
                    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
