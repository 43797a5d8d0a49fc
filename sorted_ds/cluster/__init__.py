"""Ranks, and what they run under: launchers, Slurm, signals, hosts that die. Knows no model."""
