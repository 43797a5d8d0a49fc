"""Modules with a copy for each depth or sub-network, like a norm or the statistics of a batch norm.

In: a module, and the axes whose sizes own copies of it. Out: a module that runs the copy of the active sub-network. On
disk, the full network's copy is in its plain checkpoint under the module's name. The other copies are in a side file
(save.py), and their names end with the owner: `model.norm.weight@d4`.
"""

import copy
from collections.abc import Sequence

from torch import nn

from sorted_ds.space import SubNet


class OwnedModule(nn.Module):
    """Runs the copy that the active sub-network owns. Hooks are those of this module, not of the copies."""

    def __init__(self, original: nn.Module, owners: Sequence[str], axes: Sequence[str], full: SubNet):
        """Makes a copy for each of `owners`, like `d4`. The full network's copy is `original` itself."""
        super().__init__()
        self.axes = tuple(axes)
        self.owner = full.name_along(self.axes)
        copies = {owner: original if owner == self.owner else copy.deepcopy(original) for owner in owners}
        self.copies = nn.ModuleDict(copies)

    def select(self, subnet: SubNet) -> None:
        """Makes the copy of `subnet` the active one."""
        self.owner = subnet.name_along(self.axes)

    @property
    def active(self) -> nn.Module:
        """The active copy."""
        return self.copies[self.owner]

    def forward(self, *args, **kwargs):
        return self.active.forward(*args, **kwargs)


def is_owner(owner: str, subnet: SubNet) -> bool:
    """Returns whether the sub-network uses the copies of `owner`, like `d4` or `d4-g2`."""
    return subnet.name_along([size[0] for size in owner.split("-")]) == owner
