"""Holds one module for each command of `sorted-ds`, whose `run(args)` returns the exit code; and the parser, cli.py."""
