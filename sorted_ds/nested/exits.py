"""Lets one pass give the hidden states of several depths, so that shallower sub-networks train in the same pass.

In: a nested model and the layers after which the running pass ends too. Out: hidden states in which the rows of each
exit follow each other, the shallowest first. The final norm and the head then run once, on all of them, so under ZeRO-3
they are gathered once.

Legend: E = exits, the pass's own end included, B = rows, T = row_tokens, H = hidden channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Exits:
    """Collects the hidden states after some layers of one forward pass. The layers and the final norm share it."""

    def __init__(self) -> None:
        self.layers: tuple[int, ...] = ()
        """The numbers of the layers after which the pass ends too, one for each exit. Two exits may have the same."""
        self._states: dict[int, Tensor] = {}
        self._is_open = False

    def select(self, layers: Sequence[int]) -> None:
        """Sets the exits of the next forward pass."""
        self.layers = tuple(layers)
        self._states.clear()
        self._is_open = bool(layers)

    def keep(self, layer: int, hidden: Tensor) -> None:
        """Keeps the output of a layer if the pass ends there too.

        In a backward pass with activation checkpointing layers run again, after the collection was closed.
        """
        if self._is_open and layer in self.layers:
            self._states[layer] = hidden

    def joined(self, hidden: Tensor) -> Tensor:
        """Returns the states of all exits and closes the collection. Shapes: [B, T, H] -> [E * B, T, H]."""
        if not self._is_open:
            return hidden
        states = [self._states[layer] for layer in self.layers]
        self._states.clear()
        self._is_open = False
        return torch.cat([*states, hidden])
