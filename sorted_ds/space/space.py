"""Sub-networks and the space of those that are trained.

In: sizes from the run file or from Python. Out: `SubNet` values in a `SubNetSpace`, on which the schedule samples,
and into which `nest` cuts a model. Nothing here knows a model; what a sub-network costs is in `nested/costs.py`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from sorted_ds.base.errors import UserError


@dataclass(frozen=True, order=True)
class SubNet:
    """A prefix of the full network: its first `depth` layers, in each its first `groups` groups and `ffn` channels.

    An attention group is one key/value head with its query heads. Source: SortedNet, arXiv 2309.00255, section 3.
    """

    depth: int
    groups: int
    ffn: int

    @property
    def name(self) -> str:
        """`d12-g4-f2048`."""
        return f"d{self.depth}-g{self.groups}-f{self.ffn}"

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, name: str) -> "SubNet":
        """The sub-network of a name. Raises UserError when the text is none."""
        found = re.fullmatch(r"d([1-9]\d*)-g([1-9]\d*)-f([1-9]\d*)", name)
        if found is None:
            raise UserError(f"{name!r} is no sub-network's name. Write depth, groups and ffn like d12-g4-f2048.")
        return cls(*map(int, found.groups()))

    def is_within(self, other: "SubNet") -> bool:
        """Whether `other` holds every weight of this one."""
        return self.depth <= other.depth and self.groups <= other.groups and self.ffn <= other.ffn


@dataclass(frozen=True)
class Cost:
    """What one sub-network costs, as counted on the extracted model."""

    parameters: int
    """All weights, tied ones once."""
    non_embedding_parameters: int
    """Those of the active layers and the final norm: what depth and width change."""
    flops_per_token: int
    """Forward matrix products, two per multiply-add, attention over `row_tokens` positions, causal mask not halved."""
    kv_bytes_per_token: int
    """Key/value cache at two bytes an element."""


class SubNetSpace(Sequence[SubNet]):
    """The sorted sub-networks that are trained; each contains every one that is smaller in all dimensions.

    `space[3]`, `space["d4-g2-f256"]`, iteration and `in` work. The largest holds all others.
    """

    def __init__(self, subnets: Iterable[SubNet], key: Callable[[SubNet], tuple] | None = None):
        """Sorts by `key` (default: depth, groups, ffn).

        Raises: UserError for an empty space, a repeated sub-network, or one without a largest.
        """
        self._subnets = tuple(sorted(subnets, key=key))
        if not self._subnets:
            raise UserError("space is empty. Name at least one sub-network.")
        repeated = [s.name for a, s in zip(self._subnets, self._subnets[1:], strict=False) if a == s]
        if repeated:
            raise UserError(f"space names {repeated[0]} more than once. Name each sub-network once.")
        self.full = SubNet(*(max(getattr(s, size) for s in self._subnets) for size in ("depth", "groups", "ffn")))
        self._members = frozenset(self._subnets)
        if self.full not in self:
            raise UserError(f"space has no sub-network that holds all others. Add {self.full}.")
        self.smallest = self._subnets[0]

    @classmethod
    def grid(cls, depths: Iterable[int], groups: Iterable[int], ffn: Iterable[int]) -> "SubNetSpace":
        """Every combination of the sizes."""
        for name, sizes in (
            ("depths", depths := list(depths)),
            ("groups", groups := list(groups)),
            ("ffn", ffn := list(ffn)),
        ):
            if not sizes or any(size < 1 for size in sizes):
                raise UserError(f"space.{name} = {sizes} must be a list of sizes of at least 1.")
            if len(set(sizes)) < len(sizes):
                raise UserError(f"space.{name} = {sizes} names a size more than once. Name each size once.")
        return cls(SubNet(*sizes) for sizes in product(depths, groups, ffn))

    @classmethod
    def of(cls, names: Iterable[str]) -> "SubNetSpace":
        """An explicit list of names."""
        return cls(SubNet.parse(name) for name in names)

    def sorted_by(self, key: Callable[[SubNet], tuple]) -> "SubNetSpace":
        """The same sub-networks in another order."""
        return SubNetSpace(self._subnets, key)

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(sorted({s.depth for s in self._subnets}))

    @property
    def groups(self) -> tuple[int, ...]:
        return tuple(sorted({s.groups for s in self._subnets}))

    @property
    def ffn(self) -> tuple[int, ...]:
        return tuple(sorted({s.ffn for s in self._subnets}))

    def __len__(self) -> int:
        return len(self._subnets)

    def __iter__(self) -> Iterator[SubNet]:
        return iter(self._subnets)

    def __contains__(self, subnet: object) -> bool:
        return subnet in self._members

    def __getitem__(self, which):
        """By position, slice or name. Raises UserError for a name that is not in the space, with near ones."""
        if not isinstance(which, str):
            return self._subnets[which]
        subnet = SubNet.parse(which)
        if subnet not in self:
            near = sorted(self._subnets, key=lambda s: _distance(s, subnet))[:3]
            raise UserError(f"{which} is not in the space. Nearest that are: {', '.join(s.name for s in near)}.")
        return subnet

    def __repr__(self) -> str:
        return f"SubNetSpace({len(self)} sub-networks, {self.smallest} to {self.full})"


def _distance(a: SubNet, b: SubNet) -> float:
    """How far two sub-networks are from each other, in relative sizes."""
    pairs = ((a.depth, b.depth), (a.groups, b.groups), (a.ffn, b.ffn))
    return sum(max(x, y) / min(x, y) - 1 for x, y in pairs)
