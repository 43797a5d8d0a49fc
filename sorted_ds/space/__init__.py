"""Sub-networks, the space of trained sub-networks, and the passes of a step. Nothing here knows a model."""

from sorted_ds.space.axes import AXES, Axis, SubNet
from sorted_ds.space.passes import LossPasses, Pass, Planned
from sorted_ds.space.sampling import Policy, Sampler
from sorted_ds.space.space import Cost, SubNetSpace

__all__ = ["AXES", "Axis", "Cost", "LossPasses", "Pass", "Planned", "Policy", "Sampler", "SubNet", "SubNetSpace"]
