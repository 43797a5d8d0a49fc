"""Computes random-looking numbers and permutations as pure functions of a key, without state.

In: a key of numbers and strings, such as (seed, "draw", step). Out: numbers and permutations. The rows and the
sampled sub-networks of a step come from here, so every rank computes them from (seed, step) alone, on any machine and
after any interruption, and nothing about them is saved. The source is BLAKE2b, whose output no library version changes.
"""

from dataclasses import dataclass
from hashlib import blake2b

NUM_ROUNDS = 6
"""Feistel rounds: four give a pseudo-random permutation (Luby and Rackoff 1988), two more are cheap."""


def keyed_number(bound: int, *key: int | str) -> int:
    """Returns a number in [0, bound). It comes from 64 random bits, so its bias is below bound / 2**64."""
    digest = blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % bound


@dataclass(frozen=True)
class Shuffle:
    """A permutation of range(size) in constant memory: `shuffle(i)` is where position i goes.

    It is a Feistel network over the smallest even number of bits that holds `size`. A value that falls outside of
    range(size) goes through the network again until it falls inside: under four times on average.
    """

    size: int
    key: tuple[int | str, ...]

    def __call__(self, position: int) -> int:
        """Returns the new position. Raises: IndexError when `position` is not in range(size)."""
        if not 0 <= position < self.size:
            raise IndexError(f"position {position} of a permutation of {self.size}")
        half_bits = max(1, ((self.size - 1).bit_length() + 1) // 2)
        value = self._mix(position, half_bits)
        while value >= self.size:
            value = self._mix(value, half_bits)
        return value

    def _mix(self, value: int, half_bits: int) -> int:
        left, right = value >> half_bits, value & ((1 << half_bits) - 1)
        for number in range(NUM_ROUNDS):
            left, right = right, left ^ keyed_number(1 << half_bits, *self.key, number, right)
        return left << half_bits | right
