"""Every mode of the engine: the factors, which combinations are allowed, and a small set that covers them.

The cover has a case for every two values of two factors that go together. Gradients are accumulated in a way of its own
for each combination of ZeRO stage, offload and precision, so the cover also has a case for each of these combinations
with every value of every other factor. Most defects need no more settings to show. The core of the cover has only the
pairs and each combination once. `python -m benchmarks.matrix` begins with these, goes on until each four settings that
go together have met, and then through the whole product.
Source of how many settings a defect needs: Kuhn, Wallace and Gallo, IEEE Transactions on Software Engineering 30 (6),
2004: at most six, and four for all but a few in a hundred.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cache, partial
from itertools import combinations, product
from typing import Any

import torch

from tests import exactness
from tests.exactness import Case

NUM_STEPS = 4
"""Steps of the schedule that a mode trains. Within them, parts of the network are used early, last and not at all."""

FACTORS: dict[str, tuple] = {
    "num_ranks": (1, 2, 3, 4),
    "stage": (0, 1, 2, 3),
    "offload": ("", "optimizer", "optimizer and weights"),
    "optimizer": ("adamw", "fused", "cpu_adam", "sgd"),
    "precision": ("fp32", "bf16"),
    "overlap": (False, True),
    "clip_norm": (0.0, 0.1),
    "tied": (False, True),
    "checkpointing": (False, True),
    "evaluate_between": (False, True),
}
STRONGEST = 4
"""Modes are chosen so that each group of so many settings that go together is in one."""
CANDIDATES = 400
"""How many random combinations the cover compares each time that it adds one."""

Setting = dict[str, Any]


@dataclass(frozen=True)
class Mode:
    """A case and the number of ranks that train it."""

    num_ranks: int
    case: Case

    @property
    def name(self) -> str:
        return f"{self.num_ranks}ranks-{self.case.name}"

    @property
    def twin(self) -> "Mode":
        """The mode that bf16 is compared with: it rounds alike, but every sample is the full network.

        Overlap, checkpointing and evaluation change no number, so several modes have the same twin.
        """
        plain = replace(self.case, overlap=False, checkpointing=False, evaluate_between=False, static=True)
        return replace(self, case=plain)


def is_allowed(setting: Setting) -> bool:
    """Whether the engine accepts these settings. It refuses all others at the start."""
    stage, offload = setting["stage"], setting["offload"]
    if setting["overlap"] and stage < 2:
        return False
    if offload and (stage == 0 or (offload != "optimizer" and stage < 3)):
        return False
    return setting["optimizer"] != "cpu_adam" or bool(offload)


def settings() -> Iterator[Setting]:
    """Yields the whole product of the factors, allowed or not."""
    for values in product(*FACTORS.values()):
        yield dict(zip(FACTORS, values, strict=True))


def allowed() -> list[Setting]:
    """Returns the part of the product that the engine accepts."""
    return list(filter(is_allowed, settings()))


def mode_of(setting: Setting) -> Mode:
    values = {key: value for key, value in setting.items() if key not in ("num_ranks", "offload")}
    offload = {"offload": bool(setting["offload"]), "offload_param": setting["offload"] == "optimizer and weights"}
    prefetch = 2_000 if setting["stage"] == 3 else 0
    return Mode(setting["num_ranks"], Case(**values, **offload, prefetch=prefetch))


def pairs(setting: Setting) -> set[tuple]:
    """Returns the setting's pairs of values, and its (stage, offload, precision)."""
    return {*combinations(setting.items(), 2), _accumulator(setting)}


def wanted(setting: Setting) -> set[tuple]:
    """Returns the setting's pairs of values, and its (stage, offload, precision) with each value."""
    return pairs(setting) | {(*_accumulator(setting), other) for other in setting.items()}


def _accumulator(setting: Setting) -> tuple:
    """Returns what decides how gradients are accumulated."""
    return tuple((key, setting[key]) for key in ("stage", "offload", "precision"))


def cover(
    candidates: Sequence[Setting],
    covered_by: Callable[[Setting], set[tuple]] = wanted,
    seed: int = 0,
    before: Sequence[Setting] = (),
) -> list[Setting]:
    """Returns a few candidates that together cover all that any candidate covers.

    `covered_by`: returns what a setting covers. `before`: settings that cover a part already; they are not returned.
    The result depends on nothing else but the seed.
    """
    left = set().union(*map(covered_by, candidates)).difference(*map(covered_by, before))
    chosen: list[Setting] = []
    generator = random.Random(seed)
    while left:
        active = generator.sample(candidates, min(CANDIDATES, len(candidates)))
        best = max(active, key=lambda setting: len(covered_by(setting) & left))
        if not covered_by(best) & left:
            best = next(setting for setting in candidates if covered_by(setting) & left)
        chosen.append(best)
        left -= covered_by(best)
    return chosen


def in_order(candidates: Sequence[Setting], seed: int = 0) -> list[Setting]:
    """Returns all candidates: first the cover, then those with which each three, then each four settings meet that go
    together, and then the others at random.
    """
    ordered = cover(candidates, seed=seed)
    for strength in range(3, STRONGEST + 1):
        ordered += cover(candidates, partial(groups, strength), seed, ordered)
    others = [setting for setting in candidates if setting not in ordered]
    random.Random(seed).shuffle(others)
    return [*ordered, *others]


def strength(chosen: Sequence[Setting], candidates: Sequence[Setting]) -> int:
    """Returns the largest number, up to 4, for which each group of so many values of a candidate is in a chosen one."""
    for number in range(STRONGEST, 0, -1):
        have, want = (set().union(*(groups(number, each) for each in part)) for part in (chosen, candidates))
        if have >= want:
            return number
    return 0


def groups(number: int, setting: Setting) -> set[tuple]:
    """Returns each group of so many values of a setting."""
    return set(combinations(setting.items(), number))


def expected(mode: Mode) -> dict:
    """Returns the weights, norms and moments of plain PyTorch in one process. Many modes share them."""
    case = mode.case
    optimizer = "sgd" if case.optimizer == "sgd" else "adamw"
    same = Case(0, case.precision, optimizer, clip_norm=case.clip_norm, tied=case.tied, static=case.static)
    return _expected(mode.num_ranks, same)


@cache
def _expected(num_ranks: int, case: Case) -> dict:
    return exactness.reference_weights(case, num_ranks, NUM_STEPS)


@dataclass(frozen=True)
class Error:
    """How far a mode is from the reference."""

    weights: float
    """The largest difference of a weight."""
    moments: float
    """The largest difference of an AdamW moment, relative to the largest value of that moment. For the second moment, a
    sum of squares, half of it. 0 for SGD."""
    norms: float
    """The largest relative difference of a gradient norm."""
    update: float
    """How far AdamW's last step is from its formula on the mode's own moments: see `update_error`. 0 for SGD."""
    rms: float
    """The root mean square of the difference: for SGD of the weights; for AdamW of the moments, each relative to the
    root mean square of the right moment, and the larger of the two."""


def error(trained: dict, mode: Mode) -> Error:
    """Returns how far a trained mode is from the reference."""
    right = expected(mode)
    # A square has twice the relative rounding of what is squared.
    powers = [(kind, power) for kind, power in zip(exactness.MOMENTS, (1, 2), strict=True) if kind in trained]
    moments = [_relative(trained[kind], right[kind]) / power for kind, power in powers]
    rms = [_rms(trained[kind], right[kind]) / _rms(right[kind]) / power for kind, power in powers]
    norms, right_norms = torch.tensor(trained["norms"]), torch.tensor(right["norms"])
    return Error(
        weights=exactness.largest_difference(trained["weights"], right["weights"]),
        moments=float(torch.tensor([0.0, *moments]).max()),
        norms=float(((norms - right_norms).abs() / right_norms).max()),
        update=update_error(trained, mode) if "before" in trained and mode.case.optimizer != "sgd" else 0.0,
        rms=float(torch.tensor(rms or [_rms(trained["weights"], right["weights"])]).max()),
    )


def update_error(trained: dict, mode: Mode) -> float:
    """Returns the largest difference of the last AdamW step from its formula on the mode's own moments, over the rate.

    In bf16 the weights agree with the reference's within the rate, whatever the update does, so they show no wrong
    update. A weight of about 1 is stored to 6e-8. Over the rate that is 6e-6 in fp32, and 6e-4 in bf16, where the rate
    is 1e-4. Source: Loshchilov & Hutter, arXiv 1711.05101, algorithm 2.
    """
    optim, largest = mode.case.optim, 0.0
    correct_first, correct_second = (1 - beta**NUM_STEPS for beta in optim.betas)
    for name, before in trained["before"].items():
        first, second = (trained[kind][name] for kind in exactness.MOMENTS)
        is_decayed = before.dim() > 1 and "embed" not in name and not (mode.case.tied and "lm_head" in name)
        kept = before * (1 - optim.learning_rate * optim.weight_decay * is_decayed)
        step = first / correct_first / ((second / correct_second).sqrt() + optim.eps)
        found = (kept - trained["weights"][name]) / optim.learning_rate
        largest = max(largest, float((found - step).abs().nan_to_num(nan=torch.inf).max()))
    return largest


def _relative(found: dict, right: dict) -> float:
    """Returns the largest difference, relative to the largest right value."""
    return exactness.largest_difference(found, right) / max(float(value.abs().max()) for value in right.values())


def _rms(found: dict, right: dict | None = None) -> float:
    """Returns the root mean square of the difference, or of the values themselves."""
    parts = [value.float() - (right[name].float() if right else 0) for name, value in found.items()]
    return float(torch.cat([part.flatten() for part in parts]).square().mean().sqrt())


# In fp32 SGD rounds to about 1e-7, and AdamW at the eps of `Case.optim` to about 5e-7, on every CPU. DeepSpeed's own
# AdamW on the CPU computes the update in another order, to about 1e-5 of the rate. Each part of the fix that is
# switched off costs over 1e-3. bf16 holds 8 bits: at so small a rate AdamW's weights show little there, and its moments
# and its update show more.
FP32_BOUNDS = {
    "sgd": Error(1e-6, 0.0, 1e-5, 0.0, math.inf),
    "adamw": Error(5e-6, 2e-6, 1e-5, 2e-5, math.inf),
}
BF16_BOUNDS = {
    "sgd": Error(1e-3, 0.0, 1e-2, 0.0, math.inf),
    "adamw": Error(1e-3, 1e-2, 1e-2, 5e-3, math.inf),
}
STATIC_BOUND = 1.25
"""How much further from the reference than its twin a bf16 mode may be, in root mean square. The largest difference of
a few thousand weights would be chance."""


def bounds(mode: Mode) -> Error:
    of = FP32_BOUNDS if mode.case.precision == "fp32" else BF16_BOUNDS
    return of["sgd" if mode.case.optimizer == "sgd" else "adamw"]


def exceeds_static(found: Error, static: Error) -> bool:
    """Whether the error of a bf16 mode is more than rounding. `static` is the error of its twin."""
    return not found.rms <= STATIC_BOUND * static.rms


def exceeds(found: Error, bound: Error) -> bool:
    """Whether an error exceeds a bound. What is not a number exceeds every bound."""
    pairs = zip(astuple(found), astuple(bound), strict=True)
    return not all(value <= limit for value, limit in pairs)
