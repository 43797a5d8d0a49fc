"""Gives ZeRO-3's prefetch the trace of each kind of pass, so that it works for sub-networks that change.

In: DeepSpeed's parameter coordinator and the next pass. Out: the coordinator with the trace of that pass. DeepSpeed
records the order of modules in one pass and prefetches by this trace in the next one. If sub-networks change, it would
discard and record traces again and again, and run without prefetch or gather layers that are skipped. Here the full
network's trace is recorded once for training and once for evaluation. The trace of a sub-network is derived from it,
with only the sub-network's layers and bundles. Tests prove that it equals a recorded trace.
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
MAX_TRACES = 256
"""The largest number of derived traces that are kept. Beyond it the least recently used one is dropped."""

Order = tuple[nn.Module, ...]


@dataclass
class Trace:
    """The modules of a kind of pass in the order in which they run, and the positions at which parameters are used."""

    order: Order
    parameters: tuple
    to_release: dict[tuple[nn.Module, int], set[int]] = field(default_factory=dict)
    """The parameters that DeepSpeed releases after a module, by module and position."""


class Traces:
    """The recorded and derived traces. `select(run)` must be called before every forward pass."""

    def __init__(self, coordinator: PartitionedParameterCoordinator, model: NestedModel):
        self._coordinator, self._model = coordinator, model
        self._layers = dict(_layer_numbers(model))
        self._recorded: dict[str, Order] = {}
        """The recorded orders of the full network, by the kind of pass: with or without a gradient."""
        self._derived: OrderedDict[Pass, Trace] = OrderedDict()
        self._running: Pass | None = None
        self._is_recording = False
        self.num_invalidated = 0
        """The number of passes that did not follow their trace and lost their prefetch. Tests check that it is 0."""
        self._decide = _uncached(getattr(type(coordinator), f"{PRIVATE}params_to_release"))
        self._set("params_to_release", self._params_to_release)

    def start_recording(self) -> None:
        """Records the full network's next passes, in training and in evaluation. All traces are derived from them."""
        self._is_recording, self._running = True, None
        self._recorded.clear()
        self._derived.clear()

    def stop_recording(self) -> None:
        """Ends the recording. Every rank must call this."""
        self._coordinator.reset_step()
        self._finish()
        self._is_recording, self._running = False, None

    def select(self, run: Pass) -> None:
        """Ends the last pass and sets the trace of the next one. While recording, every rank must call this."""
        self._coordinator.reset_step()
        self._finish()
        self._running = run
        trace = self._trace()
        self._set("trace_mode", ZeRoTraceMode.COMPLETE if trace else ZeRoTraceMode.INVALID)
        self._set("submodule_order", trace.order if trace else [])
        self._set("param_order", trace.parameters if trace else [])

    def order_of(self, run: Pass) -> Order:
        """Returns the modules that a pass runs, in order. The full network must have been recorded before."""
        layers = set(self._model.space.layers_of(run.subnet))
        order = self._recorded[_kind_of(run)]
        return tuple(module for module in order if self._layers.get(module) in layers or module not in self._layers)

    def _finish(self) -> None:
        """Keeps the order that the last pass recorded, or counts the pass if it did not follow its trace."""
        if self._running is None:
            return
        is_complete = self._coordinator.is_complete_trace()
        if self._running in self._derived:
            self.num_invalidated += not is_complete
        elif is_complete and self._is_recording and self._running.subnet == self._model.space.full:
            self._recorded[_kind_of(self._running)] = tuple(self._get("submodule_order"))

    def _trace(self) -> Trace | None:
        """Returns the trace of the pass that runs, or None if the full network has not been recorded yet."""
        assert self._running is not None
        if self._running not in self._derived and _kind_of(self._running) in self._recorded:
            order = self.order_of(self._running)
            self._derived[self._running] = Trace(order, tuple(self._parameters(order)))
            if len(self._derived) > MAX_TRACES:
                self._derived.popitem(last=False)
        if self._running in self._derived:
            self._derived.move_to_end(self._running)
        return self._derived.get(self._running)

    def _parameters(self, order: Iterable[nn.Module]) -> Iterator:
        """Yields each parameter at each position where it is used at the active widths, as `record_parameters` does."""
        for position, module in enumerate(order):
            for parameter in sorted(set(iter_params(module)), key=lambda p: p.ds_id):
                yield self._get("ParamInTrace")(param=parameter, step_id_last_used_at=position)

    def _params_to_release(self, module: nn.Module, position: int) -> set[int]:
        """Returns DeepSpeed's decision, cached for each trace. DeepSpeed's own cache does not distinguish traces."""
        assert self._running is not None
        cached = self._derived[self._running].to_release
        if (module, position) not in cached:
            cached[module, position] = self._decide(self._coordinator, module, position)
        return cached[module, position]

    def _get(self, name: str):
        return getattr(self._coordinator, f"{PRIVATE}{name}")

    def _set(self, name: str, value: object) -> None:
        setattr(self._coordinator, f"{PRIVATE}{name}", value)


def _kind_of(run: Pass) -> str:
    """Returns the kind of the full network's recorded pass from which the order of this pass is derived."""
    return "with a gradient" if run.has_gradient else "without"


def _uncached(decorated) -> Callable[..., set[int]]:
    """Returns DeepSpeed's function without its two decorators, a timer and an lru_cache."""
    cached = next(c.cell_contents for c in decorated.__closure__ if hasattr(c.cell_contents, "cache_clear"))
    return cached.__wrapped__


def _layer_numbers(model: NestedModel) -> Iterator[tuple[nn.Module, int]]:
    """Yields every module inside a layer, with the number of the layer."""
    for number, layer in enumerate(model.all_layers):
        yield from ((module, number) for module in layer.modules())
