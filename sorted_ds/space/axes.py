"""The axes along which networks are nested, and `SubNet`, a value of sizes over some of them.

In: sizes, or a name like `d12-g4-f2048`. Out: immutable values, ordered, named, and compared by their axes alone. A new
axis is one entry of `AXES`: names, grids, the run file's keys and messages follow from it.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sorted_ds.base.errors import UserError


@dataclass(frozen=True)
class Axis:
    """One dimension of a network."""

    letter: str
    """What a size is written with in a sub-network's name."""
    sizes: str
    """The key of the run file, and of `SubNetSpace.grid`, that lists the sizes."""
    label: str
    """What a size counts, in two words."""
    counts: str
    """What a size counts, in full."""


AXES = {
    axis.letter: axis
    for axis in (
        Axis("d", "depths", "layers", "layers"),
        Axis(
            "g", "groups", "attention groups", "attention groups (key/value heads with their query heads) in each layer"
        ),
        Axis("f", "ffn", "ffn channels", "feed-forward channels in each layer"),
        Axis("w", "widths", "channels", "channels of a convolutional network, or of a layer that has no other width"),
    )
}
"""By letter, in the order in which names and grids have them."""

DEPTH = "d"
"""The axis that every family has: a layer is in a sub-network or it is not."""


@dataclass(frozen=True, order=True, init=False)
class SubNet:
    """A part of the full network: a size along each axis of its family.

    `SubNet(d=12, g=4, f=2048)` is named `d12-g4-f2048`: the first 12 layers of the layer order, and in each of them the
    first 4 attention groups and 2,048 feed-forward channels. Source: SortedNet, arXiv 2309.00255, section 3.
    """

    sizes: tuple[tuple[str, int], ...]
    """(letter of the axis, size), in the family's order."""

    def __init__(self, **sizes: int):
        """Raises: UserError for an axis that is not in `AXES`, or a size below 1."""
        for letter, size in sizes.items():
            if letter not in AXES:
                raise UserError(f"{letter!r} is not an axis. Axes: {', '.join(AXES)}.")
            if size < 1:
                raise UserError(f"{letter}{size}: a size must be at least 1.")
        object.__setattr__(self, "sizes", tuple(sizes.items()))

    @classmethod
    def parse(cls, name: str) -> "SubNet":
        """Returns the sub-network with this name. Raises: UserError when the text is not a name."""
        parts = [re.fullmatch(r"([a-z])([1-9]\d*)", part) for part in name.split("-")]
        sizes = {part[1]: int(part[2]) for part in parts if part is not None and part[1] in AXES}
        if len(sizes) < len(parts):
            raise UserError(
                f"{name!r} is not the name of a sub-network. Write a size for each axis, like d12-g4-f2048."
            )
        return cls(**sizes)

    @property
    def name(self) -> str:
        """`d12-g4-f2048`."""
        return "-".join(f"{letter}{size}" for letter, size in self.sizes)

    def __str__(self) -> str:
        return self.name

    @property
    def axes(self) -> tuple[str, ...]:
        """The letters of its axes."""
        return tuple(letter for letter, _ in self.sizes)

    def __getitem__(self, letter: str) -> int:
        """The size along an axis. Raises: KeyError when the sub-network does not have the axis."""
        return dict(self.sizes)[letter]

    @property
    def depth(self) -> int:
        """How many layers it has."""
        return self[DEPTH]

    def replace(self, **sizes: int) -> "SubNet":
        """Returns the sub-network with other sizes along the named axes."""
        return SubNet(**{**dict(self.sizes), **sizes})

    def only(self, axes: Sequence[str]) -> str:
        """Returns the part of the name that these axes have, like `d4` of `d4-g2-f256`."""
        return "-".join(f"{letter}{size}" for letter, size in self.sizes if letter in axes)

    def is_within(self, other: "SubNet") -> bool:
        """Whether `other` holds every weight of this one. Both have the same axes."""
        return all(mine <= theirs for mine, theirs in _pairs(self, other))

    def distance(self, other: "SubNet") -> float:
        """How far the sizes are apart, as a sum of relative differences. Both have the same axes."""
        return sum(max(pair) / min(pair) - 1 for pair in _pairs(self, other))


def _pairs(a: SubNet, b: SubNet) -> Iterator[tuple[int, int]]:
    for (letter, size), (other_letter, other_size) in zip(a.sizes, b.sizes, strict=True):
        assert letter == other_letter, (a, b)
        yield size, other_size
