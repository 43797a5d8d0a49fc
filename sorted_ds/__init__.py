"""Trains one large network that holds many smaller ones. Start with `SubNetSpace`, `nest` and `view`."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sorted_ds.base.errors import UserError
    from sorted_ds.deploy.family import TrainedFamily, load
    from sorted_ds.deploy.view import view
    from sorted_ds.families import nest
    from sorted_ds.nested import NestedModel, extract
    from sorted_ds.space import SubNet, SubNetSpace

__all__ = ["NestedModel", "SubNet", "SubNetSpace", "TrainedFamily", "UserError", "extract", "load", "nest", "view"]

_MODULES = {
    "TrainedFamily": "deploy.family",
    "load": "deploy.family",
    "nest": "families",
    "SubNet": "space",
    "SubNetSpace": "space",
    "UserError": "base.errors",
    "view": "deploy.view",
}
"""Names -> the modules that define them. The others are in `nested`."""


def __getattr__(name: str) -> object:
    """Imports a public name when it is first used, so that `sorted-ds --help` does not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'sorted_ds' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sorted_ds.{_MODULES.get(name, 'nested')}"), name)
