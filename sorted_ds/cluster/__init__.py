"""Ranks and what surrounds them: launchers, Slurm, signals, hosts that fail. Knows nothing of models."""
