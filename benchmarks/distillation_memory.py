"""Live memory of a loss with a teacher and exits at a vocabulary of 49,152: `python -m benchmarks.distillation_memory`.

In: a head of 49,152 x 576 in fp32 on the CPU. Out: a table of the largest number of bytes that live in the forward and
the backward pass, beside the inputs and the head itself, for each loss and number of positions.
"""

import torch
from torch import nn

from sorted_ds.nested.family import LogitsRule
from sorted_ds.tasks.losses import CHUNK_ELEMENTS, LossHead, Teacher, Terms
from tests.memory import LiveBytes

VOCABULARY, HIDDEN = 49_152, 576
POSITIONS = (1024, 4096)
MIB = 2**20
LOSSES: dict[str, tuple[Terms | None, bool]] = {
    "labels": (None, False),
    "labels and the full network": (Terms(0.5, 1.0), True),
    "labels and the full network, temperature 2": (Terms(0.5, 2.0), True),
    "labels, three exits": (Terms(exit_weight=0.3), False),
    "labels, the full network, three exits": (Terms(0.5, 1.0, 0.3), True),
}


def peak(terms: Terms | None, has_teacher: bool, num: int) -> float:
    """Returns the MiB that live at most beside the inputs and the head."""
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    head.__class__ = LossHead
    head.rule, head.chunk_elements = LogitsRule(), CHUNK_ELEMENTS  # type: ignore[assignment]
    num_exits = 3 if terms is not None and terms.exit_weight else 1
    hidden = torch.randn(num_exits, num, HIDDEN, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (1, num))
    teacher = Teacher(torch.randn(num, HIDDEN)) if has_teacher else None
    with LiveBytes() as live:
        found = head(hidden, labels, terms=terms, teacher=teacher)
        (found if terms is None else found[0]).backward()
    return live.peak / MIB


def main() -> None:
    whole = {num: num * VOCABULARY * 4 / MIB for num in POSITIONS}
    print(f"| loss | {' | '.join(f'{num:,} positions' for num in POSITIONS)} |")
    print("|---|" + "---|" * len(POSITIONS))
    print(f"| (whole logits, once) | {' | '.join(f'{whole[num]:.0f} MiB' for num in POSITIONS)} |")
    for name, (terms, has_teacher) in LOSSES.items():
        print(f"| {name} | {' | '.join(f'{peak(terms, has_teacher, num):.0f} MiB' for num in POSITIONS)} |", flush=True)


if __name__ == "__main__":
    main()
