"""Exceptions for what a user can mend.

The command line prints their message on one line and leaves with exit code 2, without a traceback. The message says
where, what with the values, and what to change. Everything else that is raised is a defect of the program and keeps
its traceback.
"""


class UserError(Exception):
    """Input, a file or a setting that the user has to change."""


class AgreedError(UserError):
    """The same error on every rank: one of them prints it."""
