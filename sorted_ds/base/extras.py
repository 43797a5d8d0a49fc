"""Imports of what only an extra of this package installs."""

from types import ModuleType

from sorted_ds.base.errors import UserError


def needed(module: str, extra: str, what: str) -> ModuleType:
    """Returns a module of an extra. `what` needs it. Raises: UserError, with the advice, when it is not installed."""
    try:
        return __import__(module, fromlist=[""])
    except ImportError as error:
        raise UserError(
            f"{what} needs {module.partition('.')[0]}, which is not installed. Run `pip install 'sorted-ds[{extra}]'`."
        ) from error
