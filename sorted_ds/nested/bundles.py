"""Bundles: under ZeRO-3, all weights that one width step adds to a layer half are one parameter.

In: a nested model. Out: the same model, in which each layer half (attention, MLP) owns a *bundle* for each width step.
ZeRO-3 has a cost per parameter, and a bundle is one parameter instead of one for each linear layer. A bundle holds the
rows that the step adds to the half's linear layers, one layer's rows after the other's. The other side of all these
weights is the hidden size (input-side weights are stored transposed), so a bundle is a matrix [rows, hidden]. Biases
and norms stay blocks.

ZeRO-3 gathers and releases weights for the half, not for its linear layers. The linear layers are called without hooks,
so hooks that somebody registers on them do not run. In autograd's graph the active bundles are inputs of the half: each
linear layer gets a *placeholder* for its weight and writes the weight's gradient into the bundles' gradients. Autograd
receives the bundles' gradients after the gradients of all placeholders. A weight is looked up anew in each pass and
never kept for the backward pass, because bundles are gathered and released in between.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from sorted_ds.nested.blocks import InputNestedLinear, NestedModule, OutputNestedLinear, Width, join
from sorted_ds.nested.layers import NestedLayer, run_by_blocks, subclass_of


class Bundle(nn.Module):
    """The rows that one width step adds to the linear layers of a half. The half owns it and never calls it."""

    def __init__(self, weight: Tensor, num_rows: Sequence[int]):
        """Takes `weight` [rows, hidden], which consists of `num_rows` rows of each linear layer."""
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.row_ranges = list(pairwise(accumulate(num_rows, initial=0)))
        """The first row of each linear layer's block, and the row after its last one."""
        self.hidden = weight.shape[1]
        self.numels = tuple(rows * self.hidden for rows in num_rows)
        """The number of elements of each block."""
        self.block_starts: tuple[int, ...] = ()
        """The first element of each block in memory that several bundles share."""
        self.memory_steps = 0
        """The number of width steps for which the shared memory has space."""
        self._memory: StorageWeakRef | None = None

    def use_shared_memory(self, memory: Tensor, block_starts: tuple[int, ...], memory_steps: int) -> None:
        """Moves the blocks, without their values, to `block_starts` of the flat `memory`, which the parameter keeps.

        From now on, until the parameter gets other memory, the values are read with `block`. The parameter itself is a
        view of the first elements of `memory`, and its own values mean nothing.
        """
        self.block_starts, self.memory_steps = block_starts, memory_steps
        self._memory = StorageWeakRef(memory.untyped_storage())
        self.parameter.data = memory[: sum(self.numels)].view(-1, self.hidden)

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter, looked up with `get`: DeepSpeed gathers a parameter that is looked up in any other way.

        Source: DeepSpeed 0.19.8, runtime/zero/parameter_offload.py (`ZeROOrderedDict`).
        """
        return self._parameters.get("weight")  # type: ignore[return-value]

    @property
    def shared_memory(self) -> Tensor | None:
        """The parameter's data if it lies in the memory of `use_shared_memory`, and otherwise None."""
        data = self.parameter.data
        is_shared = self._memory is not None and data.untyped_storage()._cdata == self._memory.cdata
        return data if is_shared else None

    def block(self, number: int) -> Tensor:
        """Returns the rows of one linear layer, as a view."""
        start, stop = self.row_ranges[number]
        shared_memory = self.shared_memory
        if shared_memory is not None:
            return shared_memory.as_strided((stop - start, self.hidden), (self.hidden, 1), self.block_starts[number])
        return self.parameter.data[start:stop]

    def blocks(self) -> list[Tensor]:
        """Returns the rows of each linear layer, as views."""
        return [self.block(number) for number in range(len(self.row_ranges))]

    def __getstate__(self) -> dict:
        """Returns the state for a copy, which has memory of its own. A weak reference cannot be copied."""
        return {**self.__dict__, "_memory": None}


class BundledHalf(nn.Module):
    """A Hugging Face class of attention or MLP, extended by `bundle`."""

    half_forward: Callable
    """Hugging Face's forward."""
    bundles: nn.ModuleList
    linear_names: tuple[str, ...]
    """The paths of the linear layers in the half."""
    linears: tuple[NestedModule, ...]
    width: Width
    block_starts: list[list[tuple[int, ...]]]
    """The `block_starts` of each bundle, by the number of width steps for which the shared memory has space."""

    def __call__(self, hidden: Tensor | None = None, *args, hidden_states: Tensor | None = None, **kwargs):
        """Passes the hidden states by position: DeepSpeed's hooks do not see the name that Hugging Face gives them."""
        return super().__call__(hidden_states if hidden is None else hidden, *args, **kwargs)

    def forward(self, hidden: Tensor, *args, **kwargs):
        active = self.active_bundles()
        grads = _BundleGradients(active)
        placeholders = _Placeholders.apply(grads, *(bundle.parameter for bundle in active))
        for number, (layer, placeholder) in enumerate(zip(self.linears, placeholders, strict=True)):
            layer.bundled_weight = _BundleWeight(active, number, placeholder, grads)
        try:
            return self.half_forward(hidden, *args, **kwargs)
        finally:
            for layer in self.linears:
                layer.bundled_weight = None

    def active_bundles(self) -> list[Bundle]:
        return list(islice(self.all_bundles(), self.width.num_steps))

    def all_bundles(self) -> Iterable[Bundle]:
        # Every pass comes here, so the slow attribute lookup of nn.Module is avoided.
        return self._modules["bundles"]._modules.values()  # type: ignore[union-attr, return-value]

    def allocate(self, step: int, like: Tensor) -> Tensor:
        """Gives the active bundle of a width step flat memory for its values, and returns the memory.

        All active bundles share the memory, so that the blocks of a weight are adjacent. If an active bundle already
        has shared memory with space for all of them, that is used. Otherwise it is new, with the dtype and device of
        `like`.
        """
        active = self.active_bundles()
        memory, num_steps = None, len(active)
        for bundle in active:
            if bundle.memory_steps >= num_steps and (shared_memory := bundle.shared_memory) is not None:
                memory, num_steps = shared_memory, bundle.memory_steps
                break
        num_elements = sum(sum(bundle.numels) for bundle in islice(self.all_bundles(), num_steps))
        memory = like.new_empty(num_elements) if memory is None else memory.as_strided((num_elements,), (1,), 0)
        active[step].use_shared_memory(memory, self.block_starts[num_steps][step], num_steps)
        return memory


class _BundleGradients:
    """The gradients of the active bundles in one pass."""

    def __init__(self, active: list[Bundle]):
        self.active = active
        self.grads: list[Tensor] = []
        self.written: set[int] = set()
        """The numbers of the linear layers whose rows have been written."""

    def add(self, number: int, left: Tensor, right: Tensor) -> None:
        """Adds `left @ right` to the gradient of a linear layer's weight. Shapes: [rows, N], [N, hidden]."""
        if not self.grads:
            self.grads = [right.new_empty(bundle.row_ranges[-1][1], bundle.hidden) for bundle in self.active]
        row = 0
        for bundle, grad in zip(self.active, self.grads, strict=True):
            start, stop = bundle.row_ranges[number]
            part = left[row : row + stop - start]
            if number in self.written:
                grad[start:stop].addmm_(part, right)
            else:
                torch.mm(part, right, out=grad[start:stop])
            row += stop - start
        self.written.add(number)

    def pop(self) -> list[Tensor]:
        """Returns the gradients and forgets them. A weight that the loss does not depend on has a gradient of zeros."""
        for bundle, grad in zip(self.active, self.grads, strict=True):
            for number, (start, stop) in enumerate(bundle.row_ranges):
                if number not in self.written:
                    grad[start:stop].zero_()
        self.written.clear()
        grads, self.grads = self.grads, []
        return grads


class _Placeholders(torch.autograd.Function):
    """Turns the active bundles into one empty tensor for each of the half's weights."""

    @staticmethod
    def forward(ctx, grads: _BundleGradients, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.grads = grads
        ctx.set_materialize_grads(False)
        return tuple(weights[0].new_empty(0) for _ in grads.active[0].row_ranges)

    @staticmethod
    def backward(ctx, *nothing: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.grads.pop()


@dataclass(slots=True)
class _BundleWeight:
    """One linear layer's active weight in the active bundles, in one pass."""

    active: list[Bundle]
    number: int
    placeholder: Tensor
    grads: _BundleGradients

    def autograd_inputs(self) -> tuple[Tensor, ...]:
        return (self.placeholder,)

    def matrix(self) -> Tensor:
        return join([bundle.block(self.number) for bundle in self.active])

    def gradients(self, left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
        self.grads.add(self.number, left, right)
        return (self.placeholder.detach(),)


class _HooklessOutput(OutputNestedLinear):
    """An output-side layer that is called without hooks, because its half has them."""

    __call__ = OutputNestedLinear.forward


class _HooklessInput(InputNestedLinear):
    """An input-side layer that is called without hooks, because its half has them."""

    __call__ = InputNestedLinear.forward


_HOOKLESS = {OutputNestedLinear: _HooklessOutput, InputNestedLinear: _HooklessInput}


def bundle(model: nn.Module) -> None:
    """Moves the weights of a nested model's halves into bundles, in place. A second call changes nothing.

    Memory holds the model and a copy of one half at a time.
    """
    for layer in model.modules():
        if isinstance(layer, NestedLayer):
            layer.run = run_by_blocks
            for half in layer.halves:
                module = layer.get_submodule(half.path)
                if not isinstance(module, BundledHalf):
                    _bundle_half(module, tuple(part.path for part in half.parts if part.side != "norm"))


def _bundle_half(half: nn.Module, linear_names: tuple[str, ...]) -> None:
    linears: Any = tuple(half.get_submodule(name) for name in linear_names)
    half.__class__ = subclass_of(type(half), BundledHalf, half_forward=type(half).forward)
    assert isinstance(half, BundledHalf)
    half.linear_names, half.linears, half.width = linear_names, linears, linears[0].width
    half.bundles = nn.ModuleList()
    for blocks in zip(*(layer.blocks for layer in linears), strict=True):
        weights = [block.weight.detach() for block in blocks]
        half.bundles.append(Bundle(torch.cat(weights), [len(weight) for weight in weights]))
        for block in blocks:
            block.weight = None
    for layer in linears:
        layer.parameter_names = tuple(name for name in layer.parameter_names if name != "weight")
        layer.__class__ = _HOOKLESS[type(layer)]
        if not layer.parameter_names:
            layer.blocks = nn.ModuleList()  # DeepSpeed walks over all modules in every pass
    numels = [bundle.numels for bundle in half.all_bundles()]
    half.block_starts = [_block_starts(numels[:num_steps]) for num_steps in range(len(numels) + 1)]


def _block_starts(numels: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Returns where each bundle's blocks start in shared memory, in which the blocks of a linear layer are adjacent.

    `numels` has the number of elements of each bundle's blocks.
    """
    starts = list(accumulate((numel for layer in zip(*numels, strict=True) for numel in layer), initial=0))
    return [tuple(starts[step :: len(numels)][: len(blocks)]) for step, blocks in enumerate(numels)]


@dataclass(frozen=True)
class Contents:
    """What a parameter consists of: the blocks of a bundle, or, for any other parameter, the parameter itself."""

    names: tuple[str, ...]
    """The names of the blocks, or of the parameter, in a model without bundles."""
    numels: tuple[int, ...]
    """The number of elements of each of them."""
    bundle: Bundle | None = None


def contents_of(model: nn.Module) -> dict[str, Contents]:
    """Returns the contents of each parameter by its name. A tied parameter occurs once."""
    contents = {
        name: Contents((name,), (getattr(parameter, "ds_numel", parameter.numel()),))
        for name, parameter in model.named_parameters()
    }
    for path, half in model.named_modules():
        for step, bundle in enumerate(half.all_bundles() if isinstance(half, BundledHalf) else ()):
            names = tuple(f"{path}.{name}.blocks.{step}.weight" for name in half.linear_names)
            contents[f"{path}.bundles.{step}.weight"] = Contents(names, bundle.numels, bundle)
    return contents
