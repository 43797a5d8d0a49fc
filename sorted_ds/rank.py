"""One rank of a run: `python -m sorted_ds.rank RUN.toml [section.key=value ...]`, as launch/train.py."""

from sorted_ds.cli import train_main

train_main()
