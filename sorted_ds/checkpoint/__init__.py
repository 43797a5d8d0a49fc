"""Checkpoints: complete or invisible, and independent of ZeRO stage, number of ranks and space."""

from sorted_ds.checkpoint.checkpoints import Checkpoints, SaveResult
from sorted_ds.checkpoint.shard_files import read_master_weights

__all__ = ["Checkpoints", "SaveResult", "read_master_weights"]
