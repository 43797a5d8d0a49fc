"""What every rank of a test imports, once for all: ranks are forked from here (spawn.py). DeepSpeed looks at no GPU."""

import functools
import gc

import cpuinfo
import deepspeed  # noqa: F401
import transformers  # noqa: F401

import sorted_ds.commands.train
import sorted_ds.deploy.figures
import sorted_ds.run.train  # noqa: F401

# DeepSpeed asks for each AdamW on the CPU that it builds; an answer takes a second.
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
cpuinfo.get_cpu_info()

# DeepSpeed collects garbage for each engine. What was imported is none, and need not be looked at.
gc.freeze()
