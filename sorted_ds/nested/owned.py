"""Modules of which sub-networks own copies: a norm for each depth, the statistics of each sub-network.

In: a module and the axes whose sizes own copies of it. Out: a module that runs the copy of the sub-network that is
active. All other weights are shared. On disk, the full network's copy is in its plain checkpoint under the module's own
name, and the others lie in a side file beside it (save.py), under the name and its owner: `model.norm.weight@d4`.
"""

import copy
from collections.abc import Sequence

from torch import nn

from sorted_ds.space import SubNet


class OwnedModule(nn.Module):
    """Runs the copy that the active sub-network owns. The copies are called without hooks: this module has them."""

    def __init__(self, original: nn.Module, owners: Sequence[str], axes: Sequence[str], full: SubNet):
        """`owners`: parts of names of sub-networks, like `d4`. The full network's copy is `original` itself."""
        super().__init__()
        self.axes = tuple(axes)
        self.owner = full.name_along(self.axes)
        copies = {owner: original if owner == self.owner else copy.deepcopy(original) for owner in owners}
        self.copies = nn.ModuleDict(copies)

    def select(self, subnet: SubNet) -> None:
        """Runs the copy of `subnet` from now on."""
        self.owner = subnet.name_along(self.axes)

    @property
    def active(self) -> nn.Module:
        """The copy that runs now."""
        return self.copies[self.owner]

    def forward(self, *args, **kwargs):
        return self.active.forward(*args, **kwargs)


def is_owner(owner: str, subnet: SubNet) -> bool:
    """Whether the sub-network uses what `owner` owns, like `d4` or `d4-g2`."""
    return subnet.name_along([size[0] for size in owner.split("-")]) == owner
