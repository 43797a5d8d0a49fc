"""`Speed`: what a sub-network needs for a batch size and a context, and `MeasuredOn`: where that was measured.

In: JSON of sorted.json, or measurements (measure.py). Out: immutable values, checked. Nothing here imports torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

GIB = 2**30
TOKENS_PER_SECOND = "tokens_per_second"
"""The key of a speed in JSON that follows from the others."""


@dataclass(frozen=True, order=True)
class Setting:
    """For what the speed of a sub-network is measured."""

    batch: int = 1
    """The number of rows that are decoded together."""
    context: int = 512
    """The tokens of a row that a decoded token attends to, itself included."""

    def __str__(self) -> str:
        return f"batch {self.batch}, context {self.context}"


@dataclass(frozen=True)
class Speed:
    """The times and the memory of one sub-network for one batch size and context.

    Times are medians. Their spread is the interquartile range. A predicted speed has none; it has the error of the
    prediction instead.
    """

    batch: int
    context: int
    prefill_ms: float
    """For `context` - 1 tokens of each row, without a cache before."""
    prefill_spread_ms: float | None
    decode_ms: float
    """For one token of each row."""
    decode_spread_ms: float | None
    memory_bytes: int
    """The weights of the exported model and its cache. On a GPU, the allocator's peak, which includes activations."""
    cache_bytes: int
    """The key/value cache of all rows."""
    median_error: float | None = None
    """None if measured. Else the relative errors of the times when each measured sub-network is predicted from the
    other measured ones: here their median."""
    largest_error: float | None = None

    def __post_init__(self) -> None:
        """Raises: ValueError for a number that cannot be."""
        counts = (self.batch, self.context, self.memory_bytes, self.cache_bytes)
        times = (self.prefill_ms, self.decode_ms)
        rest = (self.prefill_spread_ms, self.decode_spread_ms, self.median_error, self.largest_error)
        valid = all(_is_number(value) and value >= 0 for value in rest if value is not None)
        valid = valid and all(_is_number(value) and value > 0 for value in times)
        if not valid or not all(isinstance(value, int) and value > 0 for value in counts):
            raise ValueError(f"a speed is {asdict(self)}")

    @property
    def setting(self) -> Setting:
        """The batch size and the context."""
        return Setting(self.batch, self.context)

    @property
    def is_measured(self) -> bool:
        """Whether the numbers were measured, not predicted from other sub-networks'."""
        return self.median_error is None

    @property
    def tokens_per_second(self) -> float:
        """The decoded tokens of all rows in a second."""
        return 1000 * self.batch / self.decode_ms

    @property
    def memory_gib(self) -> float:
        return self.memory_bytes / GIB

    def to_json(self) -> dict[str, Any]:
        """Returns the fields, and the tokens per second."""
        return {**asdict(self), TOKENS_PER_SECOND: self.tokens_per_second}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Speed":
        """Returns the speed that `to_json` wrote. Raises: TypeError for other keys, ValueError for other values."""
        return cls(**{key: value for key, value in stored.items() if key != TOKENS_PER_SECOND})


@dataclass(frozen=True)
class MeasuredOn:
    """Where the speeds of a table were measured. Speeds that were measured elsewhere cannot be compared with them."""

    device: str
    """The name of the GPU or the CPU."""
    dtype: str
    num_threads: int
    torch: str
    transformers: str

    def __post_init__(self) -> None:
        """Raises: ValueError for a value of another type."""
        for field in fields(self):
            if not isinstance(getattr(self, field.name), field.type):  # type: ignore[arg-type]
                raise ValueError(f"measured_on.{field.name} is {getattr(self, field.name)!r}")

    def __str__(self) -> str:
        return (
            f"{self.device}, {self.dtype}, {self.num_threads} thread{'s' if self.num_threads > 1 else ''}, "
            f"torch {self.torch}, transformers {self.transformers}"
        )


def merged(earlier: Sequence[Speed], new: Sequence[Speed]) -> tuple[Speed, ...]:
    """Returns the speeds of both in the order of their settings. A new one replaces an earlier one."""
    by_setting = {speed.setting: speed for speed in (*earlier, *new)}
    return tuple(by_setting[setting] for setting in sorted(by_setting))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
