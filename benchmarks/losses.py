"""Prints how far each loss and each policy is from plain PyTorch: `python -m benchmarks.losses`. Two gloo ranks.

In: the modes of tests/engine/test_losses.py, in which each two settings meet. Out: two tables with the largest
difference of a weight after three steps, by optimizer and precision, and that of a gradient norm. Takes minutes.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path

from tests.engine import test_losses
from tests.exactness import largest_difference
from tests.losses import LOSSES, POLICIES, LossCase

KINDS = [(precision, optimizer) for precision in ("fp32", "bf16") for optimizer in ("sgd", "adamw")]


def weights_error(found: dict, case: LossCase) -> float:
    return largest_difference(found["weights"], test_losses.expected(case)["weights"])


def norms_error(found: dict, case: LossCase) -> float:
    pairs = zip(found["norms"], test_losses.expected(case)["norms"], strict=True)
    return max(abs(norm - right) / right for norm, right in pairs)


def row(name: str, cases: Iterable[LossCase], results: dict[str, dict]) -> str:
    own = list(cases)
    cells = [name, str(len(own))]
    for kind in KINDS:
        errors = [weights_error(results[c.name], c) for c in own if (c.mode.precision, c.mode.optimizer) == kind]
        cells.append(f"{max(errors):.1e}" if errors else "-")
    in_fp32 = [norms_error(results[case.name], case) for case in test_losses.in_fp32(own)]
    return f"| {' | '.join([*cells, f'{max(in_fp32):.1e}'])} |"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = test_losses.train(test_losses.CASES, Path(folder))
    for factor, values in (("loss", LOSSES), ("policy", POLICIES)):
        print("\n| " + " | ".join([factor, "modes", *(f"{a}, {b}" for a, b in KINDS), "norms, fp32"]) + " |")
        print("|---" * (len(KINDS) + 3) + "|")
        for value in values:
            print(row(value, (case for case in test_losses.CASES if getattr(case, factor) == value), results))


if __name__ == "__main__":
    main()
