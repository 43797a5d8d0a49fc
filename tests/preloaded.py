"""What every rank of a test imports, once for all: ranks are forked from here (spawn.py). DeepSpeed looks at no GPU."""

import deepspeed  # noqa: F401
import transformers  # noqa: F401

import sorted_ds.commands.train
import sorted_ds.figure
import sorted_ds.train  # noqa: F401
