"""One rank of a run: `python -m sorted_ds.commands.rank RUN.toml [section.key=value ...]`, as launch/train.py."""

from sorted_ds.commands.cli import train_main

train_main()
