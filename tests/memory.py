"""The bytes of tensors that exist at a time, counted; and what a training step holds, ours or plain DeepSpeed's.

For the tests and `benchmarks/memory.py`.
"""

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import deepspeed
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from sorted_ds.engine import Engine
from sorted_ds.engine.modes import complete_config
from sorted_ds.engine.optimizers import build_optimizer
from sorted_ds.families import nest
from sorted_ds.nested import NestedModel, extract
from sorted_ds.run.config import Optim
from sorted_ds.space import Pass, SubNet, SubNetSpace
from tests.batches import TASK, batch, blank, summed


class LiveBytes(TorchDispatchMode):
    """`now`: bytes of live tensors that were made since the mode is on. `peak`: the most since `restart`.

    Sees the result of every tensor operation, in the backward pass too. A storage counts once, from when it is first
    seen until it is freed; a weak reference tells, so what autograd or C++ alone holds counts as well. What a kernel
    allocates and frees inside itself is not seen; a slice of a mapped file counts as if it were memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.shapes: set[torch.Size] = set()
        """The shapes of all tensors that were made."""
        self._seen: set[int] = set()

    def restart(self) -> None:
        """The peak is what is live now."""
        self.peak = self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.shapes.add(tensor.shape)
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += nbytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key, nbytes)

    def _freed(self, key: int, nbytes: int) -> None:
        self._seen.remove(key)
        self.now -= nbytes


@dataclass(frozen=True)
class StepBytes:
    """Live bytes of one optimizer step, each of the rank that has most."""

    between: int
    """Before it: weights and optimizer state."""
    passes: int
    """At most, in the forward and backward passes."""
    added: int
    """What the passes hold beside weights and optimizer state."""
    update: int
    """At most, in the optimizer's update after them."""
    shapes: frozenset[torch.Size]
    """The shapes of all tensors that rank 0 made."""

    @property
    def most(self) -> int:
        return max(self.passes, self.update)


REPEATS = 5
"""How many steps are measured."""
NAMED = {"full": lambda space: space.full, "smallest": lambda space: space.smallest}
"""The sub-networks that are measured."""


def of_subnets(
    ranks, config: LlamaConfig, space: SubNetSpace, zero: dict, ids: torch.Tensor, bf16: bool = False
) -> dict[str, StepBytes]:
    """Bytes of a step that trains one named sub-network in the engine, for each of them. A collective."""
    return of_steps(ranks, config, space, zero, ids, {name: [named(space)] for name, named in NAMED.items()}, bf16)


def of_steps(
    ranks,
    config: LlamaConfig,
    space: SubNetSpace,
    zero: dict,
    ids: torch.Tensor,
    steps: dict[str, list[SubNet]],
    bf16: bool = False,
) -> dict[str, StepBytes]:
    """Bytes of each named step, which trains its sub-networks one after the other in the engine. A collective."""
    keys = {"zero_optimization": zero, "bf16": {"enabled": bf16}}
    with LiveBytes() as live:
        model = nest(LlamaForCausalLM(copy.deepcopy(config)), space).to(ranks.device)
        model = model.to(torch.bfloat16) if bf16 else model
        engine = Engine(model, TASK, keys, "test.json", Optim(), len(ids), ranks)
        del model
        engine.warm_up(blank(*ids.shape))

        def passes(subnets: list[SubNet]) -> None:
            for subnet in subnets:
                engine.backward(engine.forward(batch(ids, ids), Pass(subnet)).loss / ids.numel())

        return {
            name: _measured(ranks, live, partial(passes, subnets), lambda: engine.step(0.0))
            for name, subnets in steps.items()
        }


def of_plain(
    ranks,
    config: LlamaConfig,
    space: SubNetSpace,
    name: str,
    zero: dict,
    ids: torch.Tensor,
    chunked: bool = True,
    grouped: bool = False,
) -> StepBytes:
    """Bytes of a step of a named sub-network's extracted model under plain DeepSpeed, with fused AdamW. A collective.

    `chunked`: its loss is ours in chunks, not Hugging Face's. `grouped`: its optimizer has our groups, not one.
    """
    with LiveBytes() as live:
        extracted = extract(nest(LlamaForCausalLM(copy.deepcopy(config)), space), NAMED[name](space))
        model: nn.Module = (summed(extracted) if chunked else extracted).to(ranks.device)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(extracted.parameters(), lr=0.0, fused=True)
        if grouped:  # what the groups ask of a nested model, said of a plain one
            alone = SubNetSpace([NAMED[name](space)])
            extracted.__dict__.update(all_layers=list(extracted.model.layers), space=alone)
            optimizer = build_optimizer(cast(NestedModel, extracted), Optim(), "fused")
        full = copy.deepcopy(complete_config({"zero_optimization": zero}, len(ids), ranks.size, 1.0))
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=full, dist_init_required=False)
        del model, extracted, optimizer

        def passes() -> None:
            if chunked:
                engine.backward(engine(**batch(ids, ids)) / ids.numel())
            else:
                engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)

        return _measured(ranks, live, passes, engine.step)


def _measured(ranks, live: LiveBytes, passes: Callable[[], object], step: Callable[[], object]) -> StepBytes:
    """The least of some steps, when DeepSpeed knows its order: gloo's threads may free a tensor late."""
    for _ in range(2):
        passes()
        step()
    gc.collect()
    live.shapes.clear()
    before, in_passes, in_step = map(min, zip(*(_once(live, passes, step) for _ in range(REPEATS)), strict=True))
    own = (before, in_passes, in_passes - before, in_step)
    told = [map(int, text.split()) for text in ranks.gather(" ".join(map(str, own)))]
    return StepBytes(*(max(values) for values in zip(*told, strict=True)), shapes=frozenset(live.shapes))


def _once(live: LiveBytes, passes: Callable[[], object], step: Callable[[], object]) -> tuple[int, int, int]:
    """Live bytes before the passes, at most in them, and at most in the step."""
    live.restart()
    before = live.now
    passes()
    in_passes = live.peak
    live.restart()
    step()
    return before, in_passes, live.peak
