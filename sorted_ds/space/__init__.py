"""Sub-networks, the space of those that are trained, and which of them a step samples. Knows no model."""

from sorted_ds.space.space import Cost, SubNet, SubNetSpace

__all__ = ["Cost", "SubNet", "SubNetSpace"]
