"""Hugging Face's classes with one of ours in front.

The new class keeps the name, which `save_pretrained` writes down and error messages tell.
"""

from torch import nn

_extended: dict[tuple[type[nn.Module], type[nn.Module]], type] = {}


def extended(own: type[nn.Module], front: type[nn.Module], **fields) -> type:
    """A subclass of both with the name of `own`, made once; `fields` are its attributes."""
    if (own, front) not in _extended:
        _extended[own, front] = type(own.__name__, (front, own), fields)
    return _extended[own, front]
