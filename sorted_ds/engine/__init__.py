"""The training engine. No other package imports deepspeed."""

from sorted_ds.engine.engine import Engine
from sorted_ds.engine.partition import partitioner

__all__ = ["Engine", "partitioner"]
