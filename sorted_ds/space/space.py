"""The space: the sub-networks that are trained, and the layer order along which depth counts.

In: sizes or names, from the run file or from Python. Out: a `SubNetSpace`, which `nest` gives to a model and from which
a step samples. Nothing here knows a model; `nested/costs.py` counts the costs of a sub-network.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from sorted_ds.base.errors import UserError
from sorted_ds.space.axes import AXES, DEPTH, SubNet


@dataclass(frozen=True)
class Cost:
    """The costs of one sub-network, counted on the extracted model."""

    parameters: int
    """The number of all weights. Tied weights count once."""
    non_embedding_parameters: int
    """The number of the weights in the layers and the final norm."""
    flops_per_token: int
    """Forward FLOPs of matrix products, two per multiply-add. Attention counts all `row_tokens` positions of a row."""
    kv_bytes_per_token: int
    """Bytes of the key/value cache at two bytes an element, or 0 for a network without such a cache."""


class SubNetSpace(Sequence[SubNet]):
    """The sorted sub-networks that are trained. The largest one contains all others.

    `space[3]`, `space["d4-g2-f256"]`, iteration and `in` work.
    """

    def __init__(
        self,
        subnets: Iterable[SubNet],
        key: Callable[[SubNet], tuple] | None = None,
        layer_order: Sequence[int] | None = None,
    ):
        """Sorts the sub-networks by `key`, by default by the sizes in the order of the axes.

        `layer_order` is a permutation of the full network's layers, counted from 0. Depth n consists of the first n
        layers of this order and runs them in the network's own sequence. The default is the network's own sequence.

        Raises: UserError for an empty space, a repeated sub-network, sub-networks with different axes, a space without
        a largest sub-network, or a layer order that is not a permutation.
        """
        members = list(subnets)
        if not members:
            raise UserError("space is empty. Name at least one sub-network.")
        self.axes = members[0].axes
        if odd := next((s for s in members if s.axes != self.axes), None):
            raise UserError(
                f"space has {members[0]} and {odd}, which differ in their axes. Name a size for the same axes, "
                "in the same order, in each."
            )
        if DEPTH not in self.axes:
            raise UserError(f"space has {members[0]}, without a depth. Name sizes along {DEPTH} ({AXES[DEPTH].sizes}).")
        self._subnets = tuple(sorted(members, key=key))
        repeated = [s.name for a, s in zip(self._subnets, self._subnets[1:], strict=False) if a == s]
        if repeated:
            raise UserError(f"space names {repeated[0]} more than once. Name each sub-network once.")
        self.full = SubNet(**{letter: max(s[letter] for s in members) for letter in self.axes})
        self._members = frozenset(members)
        if self.full not in self:
            raise UserError(f"space has no sub-network that holds all others. Add {self.full}.")
        self.smallest = self._subnets[0]
        num_layers = self.full.depth
        self.layer_order = tuple(range(num_layers) if layer_order is None else layer_order)
        if sorted(self.layer_order) != list(range(num_layers)):
            raise UserError(
                f"space.layer_order = {list(self.layer_order)} is not a permutation of the {num_layers} layers. Name "
                f"each number from 0 to {num_layers - 1} once."
            )

    @classmethod
    def grid(cls, *, layer_order: Sequence[int] | None = None, **sizes: Iterable[int]) -> "SubNetSpace":
        """Returns the space of every combination of sizes: `grid(depths=[4, 8], groups=[2, 4], ffn=[256, 512])`.

        Raises: UserError for a key that is not the `sizes` of an axis, an empty list, or a repeated size.
        """
        letters = {axis.sizes: axis.letter for axis in AXES.values()}
        given = {name: list(values) for name, values in sizes.items()}
        for name, values in given.items():
            if name not in letters:
                raise UserError(f"space.{name} is not a list of sizes. Known: {', '.join(letters)}.")
            if not values or any(size < 1 for size in values):
                raise UserError(f"space.{name} = {values} must be a list of sizes of at least 1.")
            if len(set(values)) < len(values):
                raise UserError(f"space.{name} = {values} names a size more than once. Name each size once.")
        axes = [letter for name, letter in letters.items() if name in given]
        combined = product(*(given[AXES[letter].sizes] for letter in axes)) if axes else ()
        return cls((SubNet(**dict(zip(axes, values, strict=True))) for values in combined), layer_order=layer_order)

    @classmethod
    def of(cls, names: Iterable[str], layer_order: Sequence[int] | None = None) -> "SubNetSpace":
        """Returns the space of the sub-networks with these names."""
        return cls((SubNet.parse(name) for name in names), layer_order=layer_order)

    def sorted_by(self, key: Callable[[SubNet], tuple]) -> "SubNetSpace":
        """Returns the same sub-networks in another order."""
        return SubNetSpace(self._subnets, key, self.layer_order)

    def sizes(self, letter: str) -> tuple[int, ...]:
        """Returns the sizes along an axis, ascending. Raises: KeyError if the space does not have the axis."""
        return tuple(sorted({subnet[letter] for subnet in self._subnets}))

    @property
    def has_own_order(self) -> bool:
        """Whether the layer order differs from the network's own sequence."""
        return self.layer_order != tuple(sorted(self.layer_order))

    def layers_of(self, subnet: SubNet) -> tuple[int, ...]:
        """Returns the numbers of the full network's layers that a sub-network runs, ascending."""
        return tuple(sorted(self.layer_order[: subnet.depth]))

    def __len__(self) -> int:
        return len(self._subnets)

    def __iter__(self) -> Iterator[SubNet]:
        return iter(self._subnets)

    def __contains__(self, subnet: object) -> bool:
        return subnet in self._members

    def __getitem__(self, key):
        """Returns a sub-network by position or name, or several by a slice.

        Raises: UserError for a name that is not in the space; the message lists the nearest ones.
        """
        if not isinstance(key, str):
            return self._subnets[key]
        subnet = SubNet.parse(key)
        if subnet.axes != self.axes:
            raise UserError(f"{key} is not in the space, whose sub-networks are named like {self.full}.")
        if subnet not in self:
            raise UserError(f"{key} is not in the space. Nearest that are: {self.nearest(subnet)}.")
        return subnet

    def nearest(self, subnet: SubNet) -> str:
        """Returns the names of the three sub-networks whose sizes are nearest. Its axes must be the space's."""
        return ", ".join(other.name for other in sorted(self._subnets, key=subnet.distance)[:3])

    def __repr__(self) -> str:
        return f"SubNetSpace({len(self)} sub-networks, {self.smallest} to {self.full})"
