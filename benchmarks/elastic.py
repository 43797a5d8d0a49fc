"""One run continued on 1 to 4 ranks, at every ZeRO stage, with several micro-batch sizes: how far from uninterrupted.

`python -m benchmarks.elastic`, about 10 minutes. Three steps in the mode of a row's source, then three in another one,
against six steps on two ranks at stage 2. Rows and samples must be the same, or the command fails. Largest differences:
of the weights absolute (AdamW at 0.01), of its moments relative to the largest.
"""

import tempfile
from pathlib import Path

from tests import exactness, resumed
from tests.checkpoint.test_checkpoint import SOURCES, first_legs
from tests.exactness import MOMENTS, Case
from tests.resumed import HALF, STEPS, Leg
from tests.spawn import on_ranks

MICRO_BATCH_ROWS = (1, 2, 5)
LEGS = [Leg(Case(stage), rows) for stage in (0, 1, 2, 3) for rows in MICRO_BATCH_ROWS]


def relative(found: dict, expected: dict) -> float:
    largest = max(float(value.abs().max()) for value in expected.values())
    return exactness.largest_difference(found, expected) / largest


def main() -> None:
    print("| saved at | continued on | stage | micro-batch rows | weights | moments |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = on_ranks(2, resumed.train, Leg(), f"{name}/whole", 0, STEPS, folder=folder / "ranks")
        for source, (num_ranks, leg) in SOURCES.items():
            on_ranks(num_ranks, first_legs, [leg], [f"{name}/{source}"], folder=folder / "ranks")
        sources = {source: f"{name}/{source}" for source in SOURCES}
        for num_ranks in (1, 2, 3, 4):
            arguments = (sources, LEGS, f"{name}/on{num_ranks}")
            results = on_ranks(num_ranks, resumed.continued, *arguments, folder=folder / "ranks", hang_seconds=1200)
            for source in sources:
                for leg in LEGS:
                    found = results[source, leg.name]
                    assert found["rows"] == expected["rows"][HALF:], (source, leg.name)
                    assert found["samples"] == expected["samples"][HALF:], (source, leg.name)
                    weights = exactness.largest_difference(found["weights"], expected["weights"])
                    moments = max(relative(found[kind], expected[kind]) for kind in MOMENTS)
                    ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"
                    cells = (source, ranks, leg.case.stage, leg.micro_batch_rows, f"{weights:.1e}", f"{moments:.1e}")
                    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
