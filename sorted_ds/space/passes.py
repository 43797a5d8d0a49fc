"""The passes of a step: what one forward pass executes, and which passes the loss adds to those that were sampled.

In: the sampled sub-networks with their shares of the step's rows. Out: all passes of the step. The loss may let the
full network teach on the same rows, end a pass at several depths, or leave layers out. Everything is a pure function
of (seed, step), the same on every rank.
Source of layer dropout: LayerSkip, arXiv 2404.16710, section 4.1: the rate of a layer grows exponentially with depth.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sorted_ds.base.shuffle import keyed_number
from sorted_ds.space.axes import DEPTH, SubNet
from sorted_ds.space.space import SubNetSpace

Mode = Literal["train", "teach", "evaluate"]
"""`train` has a gradient. `teach` has none and runs before the passes that learn from it. `evaluate` has none."""
FINE = 2**32
"""Random numbers between 0 and 1 are multiples of 1 / FINE."""


@dataclass(frozen=True)
class Pass:
    """What one forward pass executes. Everything that depends on it, like ZeRO-3's traces, uses it as a key."""

    subnet: SubNet
    mode: Mode = "train"
    exits: tuple[int, ...] = ()
    """The depths, ascending, at which the pass gives hidden states too, beside the sub-network's own depth."""
    dropped: tuple[int, ...] = ()
    """The numbers of the layers that the pass leaves out, ascending."""

    @property
    def has_gradient(self) -> bool:
        return self.mode == "train"

    def __str__(self) -> str:
        exits = f" exits {self.exits}" if self.exits else ""
        dropped = f" without layers {self.dropped}" if self.dropped else ""
        return f"{self.subnet}/{self.mode}{exits}{dropped}"


@dataclass(frozen=True)
class Planned:
    """One pass of a step, with the share of the step's rows that it runs on."""

    pass_: Pass
    share: int
    """The number of the share, counted from 0."""

    def __str__(self) -> str:
        return f"{self.pass_}/{self.share}"


@dataclass(frozen=True)
class LossPasses:
    """Which passes the loss needs beside the sampled ones, and how it changes these."""

    full_teaches: bool = False
    """Sub-networks learn from the full network on the same rows: from its training pass there, or from a pass of it
    without a gradient."""
    exit_rate: float = 0.0
    """The probability with which a pass also trains each shallower sub-network of the space that has its widths."""
    layer_dropout: float = 0.0
    """The probability that a pass leaves out the last layer of its sub-network. Earlier layers have smaller ones, and
    the first layer has 0."""

    def applied(self, plan: Sequence[Planned], space: SubNetSpace, seed: int, step: int) -> list[Planned]:
        """Returns the passes of a step for its sampled ones. A share's teacher runs before the passes that learn."""
        changed = [
            replace(planned, pass_=self._changed(planned.pass_, space, seed, step, number))
            for number, planned in enumerate(plan)
        ]
        return self._with_teachers(changed, space.full) if self.full_teaches else changed

    def _changed(self, pass_: Pass, space: SubNetSpace, seed: int, step: int, number: int) -> Pass:
        if not pass_.has_gradient:
            return pass_
        exits = sampled_exits(exits_of(pass_.subnet, space), self.exit_rate, (seed, "exits", step, number))
        # A teacher has all of its layers.
        rate = 0.0 if self.full_teaches and pass_.subnet == space.full else self.layer_dropout
        dropped = dropped_layers(space.layers_of(pass_.subnet), rate, (seed, "dropout", step, number))
        return replace(pass_, exits=exits, dropped=dropped)

    @staticmethod
    def _with_teachers(plan: Sequence[Planned], full: SubNet) -> list[Planned]:
        found: list[Planned] = []
        for share in dict.fromkeys(planned.share for planned in plan):
            passes = [planned for planned in plan if planned.share == share]
            own = [planned for planned in passes if planned.pass_.subnet == full and planned.pass_.has_gradient]
            learners = [planned for planned in passes if planned.pass_.subnet != full]
            teachers = [Planned(Pass(full, "teach"), share)] if learners and not own else []
            found += [*teachers, *own, *learners]
        return found


def exits_of(subnet: SubNet, space: SubNetSpace) -> tuple[int, ...]:
    """Returns the smaller depths of the space at which a pass of a sub-network can end too.

    The sub-network with that depth and the same widths is in the space, and its layers come first in the pass. With a
    layer order of its own, a shallower sub-network may lack a layer in between, so a pass cannot end there.
    """
    layers = space.layers_of(subnet)
    smaller = [subnet.replace(**{DEPTH: depth}) for depth in space.sizes(DEPTH) if depth < subnet.depth]
    found = (each for each in smaller if each in space and space.layers_of(each) == layers[: each.depth])
    return tuple(each.depth for each in found)


def sampled_exits(exits: Sequence[int], rate: float, key: tuple) -> tuple[int, ...]:
    """Returns the exits that a pass trains, each with the probability `rate`."""
    return tuple(depth for depth in exits if keyed_number(FINE, *key, depth) < rate * FINE)


def dropped_layers(layers: Sequence[int], rate: float, key: tuple) -> tuple[int, ...]:
    """Returns which of the layers a pass leaves out. The last one is left out with the probability `rate`.

    The probability of layer i of n is `rate * (2 ** (i / (n - 1)) - 1)`, so the first layer always runs.
    """
    if not rate or len(layers) < 2:
        return ()
    rates = (rate * (2 ** (number / (len(layers) - 1)) - 1) for number in range(len(layers)))
    return tuple(
        layer for layer, own in zip(layers, rates, strict=True) if keyed_number(FINE, *key, layer) < own * FINE
    )


def layers_that_run(pass_: Pass, space: SubNetSpace) -> tuple[int, ...]:
    """Returns the numbers of the full network's layers that a pass runs, ascending."""
    return tuple(layer for layer in space.layers_of(pass_.subnet) if layer not in pass_.dropped)
