"""Modules with a copy for each depth or sub-network, like a norm or the statistics of a batch norm.

In: a module, and the axes whose sizes own copies of it. Out: a module that runs the copy of the active sub-network. On
disk, the full network's copy is in its plain checkpoint under the module's name. The other copies are in a side file
(save.py), and their names end with the owner: `model.norm.weight@d4`.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sorted_ds.space import SubNet


class OwnedModule(nn.Module):
    """Runs the copy that the active sub-network owns. Hooks are those of this module, not of the copies."""

    def __init__(self, original: nn.Module, owners: Sequence[str], axes: Sequence[str], full: SubNet):
        """Makes a copy for each of `owners`, like `d4`. The full network's copy is `original` itself."""
        super().__init__()
        self.axes = tuple(axes)
        self.active: tuple[str, ...] = (full.name_along(self.axes),)
        """The owners of the copies that run, one for each exit of the pass (exits.py)."""
        copies = {owner: original if owner in self.active else copy.deepcopy(original) for owner in owners}
        self.copies = nn.ModuleDict(copies)

    def select(self, *subnets: SubNet) -> None:
        """Makes the copy of the sub-network the active one, or for a pass with exits those of all of them."""
        self.active = tuple(subnet.name_along(self.axes) for subnet in subnets)

    def forward(self, hidden: Tensor, *args, **kwargs):
        """Returns the output of the active copy. With exits each copy runs on the rows of its own exit."""
        if len(self.active) == 1:
            return self.copies[self.active[0]].forward(hidden, *args, **kwargs)
        parts = zip(self.active, hidden.chunk(len(self.active)), strict=True)
        return torch.cat([self.copies[owner].forward(part, *args, **kwargs) for owner, part in parts])


def is_owner(owner: str, subnet: SubNet) -> bool:
    """Returns whether the sub-network uses the copies of `owner`, like `d4` or `d4-g2`."""
    return subnet.name_along([size[0] for size in owner.split("-")]) == owner
