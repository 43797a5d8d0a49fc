"""Exceptions for errors that the user can correct.

The command line prints the message on one line, without a traceback, and exits with code 2. The message says where the
error is, which value is wrong, and what to change. Every other exception is a defect of the program and keeps its
traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """The user has to change an input, a file or a setting."""


class AgreedError(UserError):
    """Every rank raises this error with the same message, so rank 0 alone prints it."""


@contextmanager
def naming(file: Path, advice: str) -> Iterator[None]:
    """Turns whatever a library raises while it reads `file` into one line that names the file and gives the advice.

    Libraries raise many types for a file that they do not accept, down to plain `Exception` and `AssertionError`.
    Raises: UserError.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{file} cannot be used: {reason_of(error)}. {advice}") from error


def reason_of(error: Exception) -> str:
    """Returns the line of the message that states the reason, without a full stop.

    A first line that ends in a colon only announces the reason. The message of some errors is a bare value.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    if isinstance(error, KeyError):
        return f"{lines[0]} is not known"
    if any(kind.__name__ == "StrictDataclassError" for kind in type(error).__mro__):
        return lines[-1].rstrip(".")
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")
