"""The architectures that can be nested, as one table for each kind, and `nest`, which finds a model's family."""

from sorted_ds.families.nest import FAMILIES, family_of, nest

__all__ = ["FAMILIES", "family_of", "nest"]
