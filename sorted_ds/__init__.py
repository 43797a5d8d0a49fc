"""One large language model that holds many smaller ones: `SubNetSpace`, `nest` and `extract` are where to begin."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sorted_ds.base.errors import UserError
    from sorted_ds.families import nest
    from sorted_ds.nested import NestedModel, extract
    from sorted_ds.space import SubNet, SubNetSpace

__all__ = ["NestedModel", "SubNet", "SubNetSpace", "UserError", "extract", "nest"]

_HOMES = {"nest": "families", "SubNet": "space", "SubNetSpace": "space", "UserError": "base.errors"}


def __getattr__(name: str) -> object:
    """Loads torch only when it is needed: `sorted-ds --help` is quick."""
    if name not in __all__:
        raise AttributeError(f"module 'sorted_ds' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sorted_ds.{_HOMES.get(name, 'nested')}"), name)
