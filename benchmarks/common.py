"""What the benchmarks share: their models, timing in turns, the interval of a median, and what ran.

A time is the slowest rank's: ranks meet before and after, and a CUDA device is waited for. What is compared runs in
turns within one process, in an order that changes from round to round, and ratios are taken within a round.
"""

import copy
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from sorted_ds.cluster.ranks import Ranks
from sorted_ds.engine import Engine
from sorted_ds.engine.modes import complete_config
from sorted_ds.families import nest
from sorted_ds.nested import NestedModel, costs_of
from sorted_ds.run.config import Optim
from sorted_ds.run.plan import FORWARD_AND_BACKWARD
from sorted_ds.space import Cost, SubNet, SubNetSpace
from tests.batches import TASK, blank


@dataclass(frozen=True)
class Size:
    """A Llama and its micro-batch."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    groups: int
    vocab: int
    rows: int
    row_tokens: int

    @property
    def tokens(self) -> int:
        """The tokens of one rank's micro-batch."""
        return self.rows * self.row_tokens

    def of(self, depth: int, groups: int, ffn: int) -> SubNet:
        """The sub-network of so many quarters of each dimension."""
        return SubNet(d=self.layers * depth // 4, g=self.groups * groups // 4, f=self.ffn * ffn // 4)

    def space(self) -> SubNetSpace:
        """27 sub-networks: a quarter, a half and all of each dimension."""
        parts = [self.of(n, n, n) for n in (1, 2, 4)]
        return SubNetSpace.grid(
            depths={s.depth for s in parts}, groups={s["g"] for s in parts}, ffn={s["f"] for s in parts}
        )


SIZES = {
    "tiny": Size(128, 384, 8, 8, 4, vocab=512, rows=2, row_tokens=64),
    "small": Size(256, 800, 8, 16, 16, vocab=1024, rows=4, row_tokens=128),
    "middle": Size(512, 1600, 8, 16, 16, vocab=4096, rows=2, row_tokens=128),
    "large": Size(4096, 14336, 4, 32, 8, vocab=16000, rows=4, row_tokens=2048),
}
"""tiny: a CPU's ms. small: what Python costs. middle: a CPU's second, as tensors cost. large: four layers of a
network of 8 B, 1.0 B with its embeddings, for one GPU."""


@dataclass(frozen=True)
class Setting:
    """What a table is measured with."""

    size: Size
    stage: int
    bf16: bool = False
    cpu_time: bool = False
    """Seconds of this rank's CPU instead of the clock on the wall: for a machine that others use, with one rank."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    def engine_keys(self) -> dict:
        """The DeepSpeed JSON of a user of sorted_ds; everything else at DeepSpeed's defaults."""
        keys: dict = {"zero_optimization": {"stage": self.stage}}
        return {**keys, "bf16": {"enabled": True}} if self.bf16 else keys


def llama(size: Size, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The same weights on every rank and at every call, made on the device that will hold them."""
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.groups,
        vocab_size=size.vocab,
        use_cache=False,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def nested_llama(
    size: Size,
    space: SubNetSpace | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> NestedModel:
    """The same, holding `space`, or the 27 sub-networks of its size."""
    return nest(llama(size, dtype, device), space or size.space())


def costs(size: Size) -> dict[SubNet, Cost]:
    """What the 27 sub-networks cost, in the size's rows."""
    model = nested_llama(size, device="meta")
    return costs_of(model.space, model.family, model.config, size.row_tokens)


def engine_of(model: NestedModel, setting: Setting, optim: Optim, ranks: Ranks) -> Engine:
    """sorted_ds, warm."""
    engine = Engine(model.to(ranks.device), TASK, setting.engine_keys(), "benchmark", optim, setting.size.rows, ranks)
    engine.warm_up(blank(setting.size.rows, setting.size.row_tokens))
    return engine


def plain_deepspeed(model: nn.Module, setting: Setting, ranks: Ranks):
    """Plain DeepSpeed around any module with the same settings, SGD at a rate of 0: for passes, not for steps."""
    config = complete_config(setting.engine_keys(), setting.size.rows, ranks.size, 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return deepspeed.initialize(
        model=model.to(ranks.device), optimizer=optimizer, config=copy.deepcopy(config), dist_init_required=False
    )[0]


def token_ids(size: Size, ranks: Ranks, number: int = 0) -> torch.Tensor:
    """Random rows of this rank. Shapes: [rows, row_tokens]."""
    generator = torch.Generator().manual_seed(number * ranks.size + ranks.rank)
    return torch.randint(size.vocab, (size.rows, size.row_tokens), generator=generator).to(ranks.device)


def timed(work: Callable[[], object], ranks: Ranks, setting: Setting) -> float:
    """Seconds until every rank has done it."""
    start = now(ranks, setting)
    work()
    return now(ranks, setting) - start


def now(ranks: Ranks, setting: Setting) -> float:
    """The time at which every rank, and its device, is here."""
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.process_time() if setting.cpu_time else time.perf_counter()


@dataclass(frozen=True)
class Interval:
    """A median and its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


def interval(values: list[float]) -> Interval:
    """Returns the interval by order statistics, without an assumption on the distribution.

    Below 6 values it is the extremes, which hold less than 95 %.

    The median is below the k-th smallest of n values with the probability of fewer than k heads in n throws.
    """
    ordered, n, k, below = sorted(values), len(values), 0, 0.0
    while (below := below + math.comb(n, k) / 2**n) <= 0.025:
        k += 1
    k = max(k, 1)
    return Interval((ordered[(n - 1) // 2] + ordered[n // 2]) / 2, ordered[k - 1], ordered[n - k])


def training_tflops(cost: Cost, tokens: int, seconds: float) -> float:
    """TFLOP/s of one rank, forward and backward, attention's causal mask not halved."""
    return FORWARD_AND_BACKWARD * cost.flops_per_token * tokens / seconds / 1e12


def speed(tflops: float, peak_tflops: float) -> str:
    """Returns TFLOP/s of a rank, and model FLOPs utilisation where the peak is known."""
    return f"{tflops:.3g} TFLOP/s" + (f", MFU {tflops / peak_tflops:.1%}" if peak_tflops else "")


def circumstances(num_ranks: int, device: str) -> str:
    """What a table's figures depend on."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("deepspeed", "torch", "transformers", "accelerate"))
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {os.cpu_count()} of them, 1 thread a rank"
    return f"{num_ranks} ranks on {where}; {packages}, Python {platform.python_version()}"
