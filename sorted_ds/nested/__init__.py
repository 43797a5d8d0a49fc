"""Nested models: a Hugging Face model that runs any sub-network. Nothing here knows of ranks or DeepSpeed."""

from sorted_ds.nested.costs import costs_of, sorted_by_cost, union_parameters
from sorted_ds.nested.family import Family
from sorted_ds.nested.nest import NestedModel, extract
from sorted_ds.nested.save import save_full

__all__ = ["Family", "NestedModel", "costs_of", "extract", "save_full", "sorted_by_cost", "union_parameters"]
