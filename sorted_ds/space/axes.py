"""The axes along which networks are nested, and `SubNet`, a value of sizes over some of them.

In: sizes, or a name like `d12-g4-f2048`. Out: immutable values that can be named, sorted and compared. A new axis is
one entry of `AXES`: names, grids, the run file's keys and messages follow from the entry.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sorted_ds.base.errors import UserError


@dataclass(frozen=True)
class Axis:
    """One dimension along which networks are nested."""

    letter: str
    """The letter that stands before the size in a sub-network's name."""
    sizes: str
    """The key that lists the sizes in the run file and in `SubNetSpace.grid`."""
    label: str
    """What a size counts, in one or two words."""
    counts: str
    """What a size counts, in a full phrase."""


AXES = {
    axis.letter: axis
    for axis in (
        Axis("d", "depths", "layers", "layers"),
        Axis(
            "g", "groups", "attention groups", "attention groups (key/value heads with their query heads) in each layer"
        ),
        Axis("f", "ffn", "ffn channels", "feed-forward channels in each layer"),
        Axis("w", "widths", "channels", "channels of a convolutional network"),
    )
}
"""The axes by letter, in the order of names and grids."""

DEPTH = "d"
"""The letter of the axis that every family has."""


@dataclass(frozen=True, order=True, init=False)
class SubNet:
    """A part of the full network, given by a size along each axis of its family.

    `SubNet(d=12, g=4, f=2048)` is named `d12-g4-f2048`: the first 12 layers of the layer order, and in each of them the
    first 4 attention groups and 2,048 feed-forward channels. Source: SortedNet, arXiv 2309.00255, section 3.
    """

    sizes: tuple[tuple[str, int], ...]
    """Pairs (letter of the axis, size), in the family's order of axes."""

    def __init__(self, **sizes: int):
        """Takes a size for each letter. Raises: UserError for an unknown axis or a size below 1."""
        for letter, size in sizes.items():
            if letter not in AXES:
                raise UserError(f"{letter!r} is not an axis. Axes: {', '.join(AXES)}.")
            if size < 1:
                raise UserError(f"{letter}{size}: a size must be at least 1.")
        object.__setattr__(self, "sizes", tuple(sizes.items()))

    @classmethod
    def parse(cls, name: str) -> "SubNet":
        """Returns the sub-network with this name. Raises: UserError if the text is not the name of a sub-network."""
        parts = [re.fullmatch(r"([a-z])([1-9]\d*)", part) for part in name.split("-")]
        sizes = {part[1]: int(part[2]) for part in parts if part is not None and part[1] in AXES}
        if len(sizes) < len(parts):
            raise UserError(
                f"{name!r} is not the name of a sub-network. Write a size for each axis, like d12-g4-f2048."
            )
        return cls(**sizes)

    @property
    def name(self) -> str:
        """The name, like `d12-g4-f2048`."""
        return "-".join(f"{letter}{size}" for letter, size in self.sizes)

    def __str__(self) -> str:
        return self.name

    @property
    def axes(self) -> tuple[str, ...]:
        """The letters of the axes, in order."""
        return tuple(letter for letter, _ in self.sizes)

    def __getitem__(self, letter: str) -> int:
        """Returns the size along an axis. Raises: KeyError if the sub-network does not have the axis."""
        return dict(self.sizes)[letter]

    @property
    def depth(self) -> int:
        """The number of layers."""
        return self[DEPTH]

    def replace(self, **sizes: int) -> "SubNet":
        """Returns a sub-network whose sizes along the named axes are replaced."""
        return SubNet(**{**dict(self.sizes), **sizes})

    def name_along(self, axes: Sequence[str]) -> str:
        """Returns the part of the name that belongs to these axes, like `d4` for `d4-g2-f256` and depth."""
        return "-".join(f"{letter}{size}" for letter, size in self.sizes if letter in axes)

    def is_within(self, other: "SubNet") -> bool:
        """Returns whether `other` holds every weight of this sub-network. Both must have the same axes."""
        return all(size <= other_size for size, other_size in _size_pairs(self, other))

    def distance(self, other: "SubNet") -> float:
        """Returns the sum of the sizes' relative differences. Both must have the same axes."""
        return sum(max(pair) / min(pair) - 1 for pair in _size_pairs(self, other))


def _size_pairs(a: SubNet, b: SubNet) -> Iterator[tuple[int, int]]:
    for (letter, size), (other_letter, other_size) in zip(a.sizes, b.sizes, strict=True):
        assert letter == other_letter, (a, b)
        yield size, other_size
