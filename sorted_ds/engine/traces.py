"""ZeRO-3's prefetch, told for each sub-network what will run.

In: DeepSpeed's parameter coordinator, which records the order of modules of one pass and gathers ahead by it in the
next. With samples that change it would record anew and throw away again: without prefetch, or gathering layers that are
skipped. Here the full network's order is recorded once for training and once for evaluation, and a sub-network's is
derived from it: without the layers that it does not run, and with the blocks that it samples. Tests prove it equal to a
recorded one.
Source of the attributes: DeepSpeed 0.19.8, runtime/zero/partitioned_param_coordinator.py.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from deepspeed.runtime.zero.partitioned_param_coordinator import (
    PartitionedParameterCoordinator,
    ZeRoTraceMode,
    iter_params,
)
from torch import nn

from sorted_ds.nested import NestedModel
from sorted_ds.space import Pass

PRIVATE = "_PartitionedParameterCoordinator__"
LARGEST_KEPT = 256
"""Traces that are kept, those used last: their memory does not grow with the space. A dropped one is derived anew."""

Order = tuple[nn.Module, ...]


@dataclass
class Trace:
    """One structure: its modules in the order of a pass, and when each of their parameters is needed."""

    order: Order
    parameters: tuple
    to_release: dict[tuple[nn.Module, int], set[int]] = field(default_factory=dict)
    """What DeepSpeed may release after a module, by module and position; it decides once for each."""


class Traces:
    """Call `select(run)` before every forward pass."""

    def __init__(self, coordinator: PartitionedParameterCoordinator, model: NestedModel):
        self._coordinator, self._model = coordinator, model
        self._layers = dict(_layer_numbers(model))
        self._full: dict[str, Order] = {}
        """The recorded orders of the full network, by the kind of pass: with a gradient, or without."""
        self._kept: OrderedDict[Pass, Trace] = OrderedDict()
        self._running: Pass | None = None
        self._is_recording = False
        self.num_invalidated = 0
        """Passes that did not follow their trace: right, but not prefetched from there on. Stays 0: tests say so."""
        self._decide = _uncached(getattr(type(coordinator), f"{PRIVATE}params_to_release"))
        self._set("params_to_release", self._params_to_release)

    def start_recording(self) -> None:
        """The full network's next passes, in training and in evaluation, are those that all others are derived from."""
        self._is_recording, self._running = True, None
        self._full.clear()
        self._kept.clear()

    def stop_recording(self) -> None:
        """A collective."""
        self._coordinator.reset_step()
        self._finish()
        self._is_recording, self._running = False, None

    def select(self, run: Pass) -> None:
        """Ends the pass before, and prepares for this one. A collective while the full network is recorded."""
        self._coordinator.reset_step()
        self._finish()
        self._running = run
        trace = self._trace()
        self._set("trace_mode", ZeRoTraceMode.COMPLETE if trace else ZeRoTraceMode.INVALID)
        self._set("submodule_order", trace.order if trace else [])
        self._set("param_order", trace.parameters if trace else [])

    def order_of(self, run: Pass) -> Order:
        """The modules that a pass runs, in order. The full network must have been recorded before."""
        layers = set(self._model.space.layers_of(run.subnet))
        order = self._full[_recorded_as(run)]
        return tuple(module for module in order if self._layers.get(module) in layers or module not in self._layers)

    def _finish(self) -> None:
        """Keeps what the pass before recorded, or notices that it did not follow its trace."""
        if self._running is None:
            return
        is_complete = self._coordinator.is_complete_trace()
        if self._running in self._kept:
            self.num_invalidated += not is_complete
        elif is_complete and self._is_recording and self._running.subnet == self._model.space.full:
            self._full[_recorded_as(self._running)] = tuple(self._get("submodule_order"))

    def _trace(self) -> Trace | None:
        """That of the structure that runs now; None where the full network was not recorded yet."""
        assert self._running is not None
        if self._running not in self._kept and _recorded_as(self._running) in self._full:
            order = self.order_of(self._running)
            self._kept[self._running] = Trace(order, tuple(self._parameters(order)))
            if len(self._kept) > LARGEST_KEPT:
                self._kept.popitem(last=False)
        if self._running in self._kept:
            self._kept.move_to_end(self._running)
        return self._kept.get(self._running)

    def _parameters(self, order: Iterable[nn.Module]) -> Iterator:
        """Each parameter at the positions where it is needed, as `record_parameters` lists them, at the set widths."""
        for position, module in enumerate(order):
            for parameter in sorted(set(iter_params(module)), key=lambda p: p.ds_id):
                yield self._get("ParamInTrace")(param=parameter, step_id_last_used_at=position)

    def _params_to_release(self, module: nn.Module, position: int) -> set[int]:
        """DeepSpeed's own decision, remembered for each structure: its one cache would answer for another's."""
        assert self._running is not None
        known = self._kept[self._running].to_release
        if (module, position) not in known:
            known[module, position] = self._decide(self._coordinator, module, position)
        return known[module, position]

    def _get(self, name: str):
        return getattr(self._coordinator, f"{PRIVATE}{name}")

    def _set(self, name: str, value: object) -> None:
        setattr(self._coordinator, f"{PRIVATE}{name}", value)


def _recorded_as(run: Pass) -> str:
    """Which recorded pass of the full network has the order of this one."""
    return "with a gradient" if run.has_gradient else "without"


def _uncached(decorated) -> Callable[..., set[int]]:
    """DeepSpeed's function under its two decorators, a timer around an lru_cache."""
    cached = next(c.cell_contents for c in decorated.__closure__ if hasattr(c.cell_contents, "cache_clear"))
    return cached.__wrapped__


def _layer_numbers(model: NestedModel) -> Iterator[tuple[nn.Module, int]]:
    """Every module of the layers, and the layer that it belongs to."""
    for number, layer in enumerate(model.all_layers):
        yield from ((module, number) for module in layer.modules())
