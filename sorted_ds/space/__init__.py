"""Sub-networks, the space of those that are trained, and the passes that a step runs. Knows no model."""

from sorted_ds.space.axes import AXES, Axis, SubNet
from sorted_ds.space.sampling import Pass, Sampler
from sorted_ds.space.space import Cost, SubNetSpace

__all__ = ["AXES", "Axis", "Cost", "Pass", "Sampler", "SubNet", "SubNetSpace"]
