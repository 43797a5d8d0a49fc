"""Runs one rank: `python -m sorted_ds.commands.rank RUN.toml [section.key=value ...]`. The job scripts call it."""

from sorted_ds.commands.cli import train_main

train_main()
