"""Exceptions for errors that the user can correct.

The command line prints the message on one line, without a traceback, and exits with code 2. The message says where the
error is, which value is wrong, and what to change. Every other exception is a defect of the program and keeps its
traceback.
"""


class UserError(Exception):
    """The user has to change an input, a file or a setting."""


class AgreedError(UserError):
    """Every rank raises this error with the same message, so rank 0 alone prints it."""
