"""Gives ZeRO-3's prefetch the trace of each kind of pass, so that it works for sub-networks that change.

In: DeepSpeed's parameter coordinator and the next pass. Out: the coordinator with the trace of that pass. DeepSpeed
records the order of modules in one pass and prefetches by this trace in the next one. If sub-networks change, it would
discard and record traces again and again, and run without prefetch or gather layers that are skipped. Here the full
network's trace is recorded once for training and once for evaluation. The trace of a sub-network is derived from it,
with only the sub-network's layers and bundles, and so are DeepSpeed's decisions what to release after which module.
Tests prove that both equal DeepSpeed's own.
Source of the attributes: DeepSpeed 0.19.8, runtime/zero/partitioned_param_coordinator.py.
"""

from bisect import bisect_left
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from deepspeed.runtime.zero.partitioned_param_coordinator import (
    PartitionedParameterCoordinator,
    ZeRoTraceMode,
    iter_params,
)
from torch import nn

from sorted_ds.nested import NestedModel
from sorted_ds.space import Pass
from sorted_ds.space.passes import layers_that_run

PRIVATE = "_PartitionedParameterCoordinator__"
MAX_TRACES = 1024
"""The largest number of derived traces that are kept: some 90 MiB at 80 layers (docs/benchmarks.md). Beyond it the
least recently used one is dropped."""

Order = tuple[nn.Module, ...]


@dataclass
class Trace:
    """The modules of a kind of pass in the order in which they run, and the positions at which parameters are used."""

    order: Order
    parameters: tuple
    to_release: dict[tuple[nn.Module, int], frozenset[int]] = field(default_factory=dict)
    """The ids of the parameters that DeepSpeed releases when a module ends, by module and position, once decided."""


class Reuse:
    """Says whether a pass uses a parameter again soon, so that DeepSpeed keeps it."""

    def __init__(self, trace: Trace, distance: int):
        """`distance`: within how many gathered elements a use counts (`stage3_max_reuse_distance`)."""
        self._distance = distance
        self._elements = [0, *accumulate(sum(p.ds_numel for p in iter_params(module)) for module in trace.order)]
        """For each position, the elements that all modules before it use."""
        self._positions: dict[int, list[int]] = defaultdict(list)
        """For each parameter, the positions at which it is used, ascending."""
        for used in trace.parameters:
            self._positions[used.param.ds_id].append(used.step_id_last_used_at)

    def is_soon(self, ds_id: int, position: int) -> bool:
        """Returns whether the parameter is used at this position or soon after it."""
        positions = self._positions.get(ds_id, [])
        number = bisect_left(positions, position)
        if number == len(positions):
            return False
        return self._elements[positions[number]] - self._elements[position] < self._distance


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
        self._reuse: Reuse | None = None
        """What the running pass uses again. It is made when the pass first needs a decision that is not kept yet."""
        self._uses: dict[tuple[int, int], Any] = {}
        """What traces hold, by parameter and position. They share it, because widths do not change positions."""
        self._sets: dict[frozenset[int], frozenset[int]] = {}
        """The sets of parameters to release, which traces share too."""
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

    def select(self, pass_: Pass) -> None:
        """Ends the last pass and sets the trace of the next one. While recording, every rank must call this."""
        self._coordinator.reset_step()
        self._finish()
        self._running, self._reuse = pass_, None
        trace = self._trace()
        self._set("trace_mode", ZeRoTraceMode.COMPLETE if trace else ZeRoTraceMode.INVALID)
        self._set("submodule_order", trace.order if trace else [])
        self._set("param_order", trace.parameters if trace else [])

    def order_of(self, pass_: Pass) -> Order:
        """Returns the modules that a pass runs, in order. The full network must have been recorded before."""
        layers = set(layers_that_run(pass_, self._model.space))
        order = self._recorded[_kind_of(pass_)]
        # The head of a teacher does not run.
        head = self._model.get_submodule(self._model.family.head) if pass_.mode == "teach" else None
        return tuple(
            module
            for module in order
            if module is not head and (module not in self._layers or self._layers[module] in layers)
        )

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

    def _parameters(self, order: Order) -> Iterator:
        """Yields each parameter at each position where it is used at the active widths, as `record_parameters` does."""
        for position, module in enumerate(order):
            for parameter in sorted(set(iter_params(module)), key=lambda p: p.ds_id):
                key = parameter.ds_id, position
                if key not in self._uses:
                    used = self._get("ParamInTrace")(param=parameter, step_id_last_used_at=position)
                    self._uses[key] = used
                yield self._uses[key]

    def _params_to_release(self, module: nn.Module, position: int) -> set[int]:
        """Returns the ids of the parameters to release, cached for each trace. The caller may change the set.

        DeepSpeed's own cache does not distinguish traces.
        """
        assert self._running is not None
        trace = self._derived[self._running]
        if (module, position) not in trace.to_release:
            decided = frozenset(self._decide(trace, module, position))
            trace.to_release[module, position] = self._sets.setdefault(decided, decided)
        return set(trace.to_release[module, position])

    def _decide(self, trace: Trace, module: nn.Module, position: int) -> Iterator[int]:
        """Yields what DeepSpeed would release, which for each module looks through the rest of the trace.

        It keeps what is persistent, what was gathered ahead for a later module, and what is used again soon.
        """
        if self._reuse is None:
            self._reuse = Reuse(trace, self._get("max_reuse_dist_in_numel"))
        gathered_for = self._get("most_recent_step_id_param_fetched_for")
        for parameter in iter_params(module):
            is_kept = parameter.ds_persist or gathered_for[parameter] > position
            if not is_kept and not self._reuse.is_soon(parameter.ds_id, position):
                yield parameter.ds_id

    def _get(self, name: str) -> Any:
        return getattr(self._coordinator, f"{PRIVATE}{name}")

    def _set(self, name: str, value: object) -> None:
        setattr(self._coordinator, f"{PRIVATE}{name}", value)


def _kind_of(pass_: Pass) -> str:
    """Returns the kind of the full network's recorded pass from which the order of this pass is derived."""
    return "with a gradient" if pass_.has_gradient else "without"


def _layer_numbers(model: NestedModel) -> Iterator[tuple[nn.Module, int]]:
    """Yields every module inside a layer, with the number of the layer."""
    for number, layer in enumerate(model.all_layers):
        yield from ((module, number) for module in layer.modules())
