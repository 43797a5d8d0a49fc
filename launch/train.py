"""Runs one rank under any launcher: `deepspeed [flags] launch/train.py RUN.toml [section.key=value ...]`."""

from sorted_ds.commands.cli import train_main

train_main()
