"""Larger spaces."""


def print_table(args, setting): ...


def print_python_table(size): ...
