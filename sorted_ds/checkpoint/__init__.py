"""Checkpoints: complete or invisible, and independent of ZeRO stage, number of ranks and space."""

from sorted_ds.checkpoint.checkpoints import Checkpoints, Saved
from sorted_ds.checkpoint.shard_files import read_master_weights

__all__ = ["Checkpoints", "Saved", "read_master_weights"]
