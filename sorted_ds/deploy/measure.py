"""Measures the speed of sub-networks on the device at hand: times of prefill and decoding, and memory.

In: a trained family, names of sub-networks, batch sizes and contexts. Out: `Speed`s by sub-network. On disk: the table
in sorted.json and subnets.json. Sub-networks run as views, in turns: each round runs all of them once, in another
order, so that a drift of the machine reaches all alike. The first round warms up and is not counted.

In a large space a part of the sub-networks is measured, spread over the space, and the rest is predicted (predict.py).
"""

import copy
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sorted_ds.base.errors import UserError
from sorted_ds.base.shuffle import Shuffle
from sorted_ds.deploy.evaluate import choose_spread
from sorted_ds.deploy.family import TrainedFamily
from sorted_ds.deploy.generation.cached import cache_key
from sorted_ds.deploy.model_dir import Measured
from sorted_ds.deploy.predict import predict_speeds
from sorted_ds.deploy.speed import MeasuredOn, Setting, Speed
from sorted_ds.space import SubNet

MEASURED_AT_MOST = 32
"""If there are more sub-networks than this, the others are predicted."""
ROUNDS = 7
DECODED = 8
"""How often a round decodes the token after the prompt. Each time starts with the same cache."""
CPU_INFO = Path("/proc/cpuinfo")

Report = Callable[[str], None]
"""Called before each run of a sub-network, with the number of the round."""


@dataclass(frozen=True)
class Run:
    """What one run of a sub-network took."""

    prefill_ms: float
    decode_ms: tuple[float, ...]
    memory_bytes: int
    cache_bytes: int


def settings_of(family: TrainedFamily, batches: Sequence[int], contexts: Sequence[int]) -> list[Setting]:
    """Returns every combination; without contexts, with that of `Setting` or what the model allows.

    Raises: UserError for a model without a cache, and for a context that the model does not allow.
    """
    if not family.has_cache:
        kind = family.config.model_type
        raise UserError(f"{kind} has no key/value cache, so it does not decode. Leave out --measure.")
    most = getattr(family.config, "max_position_embeddings", None)
    for context in contexts:
        if context < 2 or (most is not None and context > most):
            limit = f" and at most max_position_embeddings = {most}" if most is not None else ""
            raise UserError(f"--context {context} cannot be measured. Name at least 2{limit}.")
    chosen = contexts or [Setting.context if most is None else min(Setting.context, most)]
    return sorted({Setting(batch, context) for batch in batches for context in chosen})


def num_runs(num_subnets: int, settings: Sequence[Setting]) -> int:
    """Returns how often `measure` runs a sub-network."""
    return (1 + ROUNDS) * len(settings) * min(num_subnets, MEASURED_AT_MOST)


def measure_family(
    family: TrainedFamily, subnets: Sequence[SubNet], settings: Sequence[Setting], report: Report = lambda number: None
) -> tuple[Measured, ...]:
    """Measures the speeds of sub-networks that are in the table, for all settings, and adds them to it. Returns it.

    `subnets`: in ascending order of parameters. More than `MEASURED_AT_MOST` are measured in part.
    """
    speeds = measure(family, subnets, settings, report)
    return family.where.add_speeds({subnet.name: speeds[subnet] for subnet in subnets}, measured_on(family))


def measure(
    family: TrainedFamily, subnets: Sequence[SubNet], settings: Sequence[Setting], report: Report = lambda number: None
) -> dict[SubNet, tuple[Speed, ...]]:
    """Returns the speeds of sub-networks for all settings, in the order of `settings`."""
    chosen = choose_spread(subnets, MEASURED_AT_MOST)
    runs = _run_in_turns(family, chosen, settings, report)
    by_setting = [{subnet: _speed(setting, runs[subnet, setting]) for subnet in chosen} for setting in settings]
    all_speeds = [{**measured, **predict_speeds(measured, subnets)} for measured in by_setting]
    return {subnet: tuple(speeds[subnet] for speeds in all_speeds) for subnet in subnets}


def measured_on(family: TrainedFamily) -> MeasuredOn:
    """Returns where the family is measured."""
    return MeasuredOn(
        device=_device_name(family.device),
        dtype=str(family.dtype).removeprefix("torch."),
        num_threads=torch.get_num_threads(),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = CPU_INFO.read_text(errors="replace").splitlines() if CPU_INFO.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _run_in_turns(
    family: TrainedFamily, subnets: Sequence[SubNet], settings: Sequence[Setting], report: Report
) -> dict[tuple[SubNet, Setting], list[Run]]:
    """Runs every sub-network once in each round, and returns the runs that count."""
    models = {subnet: family[subnet] for subnet in subnets}
    runs = defaultdict(list)
    for number in range(1 + ROUNDS):
        turns = Shuffle(len(subnets), ("measure", number))
        for setting in settings:
            ids = _ids(family, setting)
            for subnet in (subnets[turns(place)] for place in range(len(subnets))):
                report(f"round {number} of {ROUNDS}" if number else "warm-up")
                run = run_once(models[subnet], ids)
                if number:
                    runs[subnet, setting].append(run)
    return runs


def _ids(family: TrainedFamily, setting: Setting) -> Tensor:
    """Returns token ids. Which ones they are does not change the time. Shape: [batch, context]."""
    generator = torch.Generator().manual_seed(0)
    shape = (setting.batch, setting.context)
    return torch.randint(family.config.vocab_size, shape, generator=generator).to(family.device)


@torch.no_grad()
def run_once(model: PreTrainedModel, ids: Tensor) -> Run:
    """Prefills all tokens of each row but the last, and decodes the last one `DECODED` times. Shape: [B, T]."""
    device = ids.device
    before = _start_of_peak(device)
    cache = DynamicCache(config=model.config)
    prefill_ms = _forward_ms(model, ids[:, :-1], cache)
    decode_ms = []
    for _ in range(DECODED):
        longer = _same(cache)
        decode_ms.append(_forward_ms(model, ids[:, -1:], longer))
    cache_bytes = _cache_bytes(longer)
    used = cache_bytes if device.type == "cpu" else torch.cuda.max_memory_allocated(device) - before
    return Run(prefill_ms, tuple(decode_ms), _weight_bytes(model) + used, cache_bytes)


def _forward_ms(model: PreTrainedModel, ids: Tensor, cache: DynamicCache) -> float:
    """Runs the model on ids that follow those in the cache, with the logits of the last one, as generation does."""
    cached = {cache_key(model): cache}
    _wait(ids.device)
    start = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1, **cached)
    _wait(ids.device)
    return 1000 * (time.perf_counter() - start)


def _same(cache: DynamicCache) -> DynamicCache:
    """Returns a cache with the same tensors. A layer of it makes new tensors when it grows, so these stay."""
    again = copy.copy(cache)
    again.layers = [copy.copy(layer) for layer in cache.layers]
    return again


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _start_of_peak(device: torch.device) -> int:
    """Returns the bytes that the allocator has given out, from where its peak counts from now on."""
    if device.type == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _weight_bytes(model: PreTrainedModel) -> int:
    """Returns the bytes of the weights and buffers if the model were alone. Tied weights count once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _cache_bytes(cache: DynamicCache) -> int:
    """Returns the bytes of the storages that the cache holds."""
    layers: Sequence[Any] = cache.layers
    storages = [tensor.untyped_storage() for layer in layers for tensor in (layer.keys, layer.values)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _speed(setting: Setting, runs: Sequence[Run]) -> Speed:
    prefill, decode = [run.prefill_ms for run in runs], [ms for run in runs for ms in run.decode_ms]
    return Speed(
        batch=setting.batch,
        context=setting.context,
        prefill_ms=statistics.median(prefill),
        prefill_spread_ms=_interquartile_range(prefill),
        decode_ms=statistics.median(decode),
        decode_spread_ms=_interquartile_range(decode),
        memory_bytes=max(run.memory_bytes for run in runs),
        cache_bytes=runs[0].cache_bytes,
    )


def _interquartile_range(values: Sequence[float]) -> float:
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return upper - lower
