"""The one place that imports deepspeed."""

from sorted_ds.engine.engine import Engine

__all__ = ["Engine"]
