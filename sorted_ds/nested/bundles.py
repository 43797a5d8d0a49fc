"""What one width step adds to a layer half, as one parameter: under ZeRO-3 each parameter has a cost of its own.

In: a nested model. Out: the same model, each of whose layer halves (attention, MLP) owns a *bundle* for each width
step: the rows that the step adds to the half's linear layers, one layer's below the other's. All of them have hidden
channels on their other side (input-side weights are stored transposed), so a bundle is a matrix [rows, hidden]. Biases
and norms stay blocks.

A half, not its linear layers, is what ZeRO-3 gathers for and releases after; they are called without hooks, so those
that somebody registers on them do not run. Autograd sees the active bundles once a half: each linear layer gets a
*placeholder* for its weight and writes the weight's gradient into those of the bundles, which are handed on when all
placeholders' gradients have come. A weight is looked up anew in each pass, never kept for the backward one, since
bundles come and go.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from sorted_ds.nested.blocks import InputNestedLinear, NestedModule, OutputNestedLinear, Width, together
from sorted_ds.nested.layers import NestedLayer, extended, run_by_blocks


class Bundle(nn.Module):
    """The rows that one width step adds to the linear layers of a half. Never called: the half owns it."""

    def __init__(self, weight: Tensor, num_rows: Sequence[int]):
        """`weight` [rows, hidden] has `num_rows` of each linear layer."""
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.places = list(pairwise(accumulate(num_rows, initial=0)))
        """The first row of each linear layer's block, and the one after its last."""
        self.hidden = weight.shape[1]
        self.sizes = tuple(rows * self.hidden for rows in num_rows)
        """Elements of the blocks."""
        self.starts: tuple[int, ...] = ()
        """Of the blocks, in memory that they share with other bundles."""
        self.num_steps = 0
        """Width steps that have room there."""
        self._memory: StorageWeakRef | None = None

    def lay_apart(self, memory: Tensor, starts: tuple[int, ...], num_steps: int) -> None:
        """The blocks lie apart in flat memory, each from its start on; the parameter keeps all of it.

        The parameter's own values mean nothing until it is given other memory: read `block`.
        """
        self.starts, self.num_steps, self._memory = starts, num_steps, StorageWeakRef(memory.untyped_storage())
        self.parameter.data = memory[: sum(self.sizes)].view(-1, self.hidden)

    @property
    def parameter(self) -> nn.Parameter:
        """Looked up with `get`: what is looked up otherwise DeepSpeed gathers, for whatever module runs.

        Source: DeepSpeed 0.19.8, runtime/zero/parameter_offload.py (`ZeROOrderedDict`).
        """
        return self._parameters.get("weight")  # type: ignore[return-value]

    @property
    def shared(self) -> Tensor | None:
        """The parameter's values now, if they are memory that `lay_apart` gave it."""
        values = self.parameter.data
        is_apart = self._memory is not None and values.untyped_storage()._cdata == self._memory.cdata
        return values if is_apart else None

    def block(self, number: int) -> Tensor:
        """The rows of one linear layer, a view, wherever they lie."""
        start, stop = self.places[number]
        shared = self.shared
        if shared is not None:
            return shared.as_strided((stop - start, self.hidden), (self.hidden, 1), self.starts[number])
        return self.parameter.data[start:stop]

    def blocks(self) -> list[Tensor]:
        """Of all linear layers."""
        return [self.block(number) for number in range(len(self.places))]

    def __getstate__(self) -> dict:
        """A copy has memory of its own, and a weak reference is not to be copied."""
        return {**self.__dict__, "_memory": None}


class BundledHalf(nn.Module):
    """What `bundle` adds to a Hugging Face class of attention or MLP."""

    half_forward: Callable
    """Hugging Face's own."""
    bundles: nn.ModuleList
    names: tuple[str, ...]
    """Of the linear layers."""
    linears: tuple[NestedModule, ...]
    width: Width
    starts: list[list[tuple[int, ...]]]
    """By the number of width steps: of each bundle, where its blocks start in memory that they all share."""

    def __call__(self, hidden: Tensor | None = None, *args, hidden_states: Tensor | None = None, **kwargs):
        """Hugging Face names the attention's input, and DeepSpeed's hooks see what has no name."""
        return super().__call__(hidden_states if hidden is None else hidden, *args, **kwargs)

    def forward(self, hidden: Tensor, *args, **kwargs):
        active = self.active()
        grads = _Grads(active)
        placeholders = _Placeholders.apply(grads, *(bundle.parameter for bundle in active))
        for number, (layer, placeholder) in enumerate(zip(self.linears, placeholders, strict=True)):
            layer.source = _Bundled(active, number, placeholder, grads)
        try:
            return self.half_forward(hidden, *args, **kwargs)
        finally:
            for layer in self.linears:
                layer.source = None

    def active(self) -> list[Bundle]:
        return list(islice(self.all_bundles(), self.width.num_steps))

    def all_bundles(self) -> Iterable[Bundle]:
        """Asked for at every use, so not by way of slow attributes."""
        return self._modules["bundles"]._modules.values()  # type: ignore[union-attr, return-value]

    def room(self, step: int, like: Tensor) -> Tensor:
        """Flat memory, which an active bundle is given. All active ones share it, so blocks of a weight are neighbours.

        It is that of an active bundle which came before, or new, of the dtype and device of `like`.
        """
        active = self.active()
        memory, num_steps = None, len(active)
        for other in active:
            if other.num_steps >= num_steps and (shared := other.shared) is not None:
                memory, num_steps = shared, other.num_steps
                break
        num_elements = sum(sum(bundle.sizes) for bundle in islice(self.all_bundles(), num_steps))
        memory = like.new_empty(num_elements) if memory is None else memory.as_strided((num_elements,), (1,), 0)
        active[step].lay_apart(memory, self.starts[num_steps][step], num_steps)
        return memory


class _Grads:
    """Of one pass: the gradients of the active bundles."""

    def __init__(self, active: list[Bundle]):
        self.active = active
        self.grads: list[Tensor] = []
        self.written: set[int] = set()
        """Linear layers whose rows are there."""

    def add(self, number: int, left: Tensor, right: Tensor) -> None:
        """`left @ right` to the gradient of a linear layer's weight: [rows, N], [N, hidden]."""
        if not self.grads:
            self.grads = [right.new_empty(bundle.places[-1][1], bundle.hidden) for bundle in self.active]
        row = 0
        for bundle, grad in zip(self.active, self.grads, strict=True):
            start, stop = bundle.places[number]
            part = left[row : row + stop - start]
            if number in self.written:
                grad[start:stop].addmm_(part, right)
            else:
                torch.mm(part, right, out=grad[start:stop])
            row += stop - start
        self.written.add(number)

    def taken(self) -> list[Tensor]:
        """Gives them away; of a weight that the loss does not depend on, they are zeros."""
        for bundle, grad in zip(self.active, self.grads, strict=True):
            for number, (start, stop) in enumerate(bundle.places):
                if number not in self.written:
                    grad[start:stop].zero_()
        self.written.clear()
        grads, self.grads = self.grads, []
        return grads


class _Placeholders(torch.autograd.Function):
    """The active bundles as one empty tensor for each of the half's weights."""

    @staticmethod
    def forward(ctx, grads: _Grads, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.grads = grads
        ctx.set_materialize_grads(False)
        return tuple(weights[0].new_empty(0) for _ in grads.active[0].places)

    @staticmethod
    def backward(ctx, *nothing: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.grads.taken()


@dataclass(slots=True)
class _Bundled:
    """A weight of the active bundles, in one pass."""

    active: list[Bundle]
    number: int
    placeholder: Tensor
    grads: _Grads

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.placeholder,)

    def matrix(self) -> Tensor:
        return together([bundle.block(self.number) for bundle in self.active])

    def gradients(self, left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
        self.grads.add(self.number, left, right)
        return (self.placeholder.detach(),)


class _BareOutput(OutputNestedLinear):
    """Without hooks: its half has them."""

    __call__ = OutputNestedLinear.forward


class _BareInput(InputNestedLinear):
    """Likewise."""

    __call__ = InputNestedLinear.forward


_BARE = {OutputNestedLinear: _BareOutput, InputNestedLinear: _BareInput}


def bundle(model: nn.Module) -> None:
    """Puts the weights of a nested model's halves together, in place; a copy of one half at a time. Once is enough."""
    for layer in model.modules():
        if isinstance(layer, NestedLayer):
            layer.run = run_by_blocks
            for half in layer.halves:
                module = layer.get_submodule(half.path)
                if not isinstance(module, BundledHalf):
                    _bundle_half(module, tuple(part.path for part in half.parts if part.side != "norm"))


def _bundle_half(half: nn.Module, names: tuple[str, ...]) -> None:
    linears: Any = tuple(half.get_submodule(name) for name in names)
    half.__class__ = extended(type(half), BundledHalf, half_forward=type(half).forward)
    assert isinstance(half, BundledHalf)
    half.names, half.linears, half.width = names, linears, linears[0].width
    half.bundles = nn.ModuleList()
    for blocks in zip(*(layer.blocks for layer in linears), strict=True):
        weights = [block.weight.detach() for block in blocks]
        half.bundles.append(Bundle(torch.cat(weights), [len(weight) for weight in weights]))
        for block in blocks:
            block.weight = None
    for layer in linears:
        layer.names = tuple(name for name in layer.names if name != "weight")
        layer.__class__ = _BARE[type(layer)]
        if not layer.names:
            layer.blocks = nn.ModuleList()  # DeepSpeed walks over all modules in every pass
    sizes = [bundle.sizes for bundle in half.all_bundles()]
    half.starts = [_starts(sizes[:num_steps]) for num_steps in range(len(sizes) + 1)]


def _starts(sizes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Of the blocks of each bundle, `sizes` of theirs, where those of a linear layer follow each other."""
    ends = list(accumulate((size for blocks in zip(*sizes, strict=True) for size in blocks), initial=0))
    return [tuple(ends[step :: len(sizes)][: len(own)]) for step, own in enumerate(sizes)]


@dataclass(frozen=True)
class Parts:
    """What a parameter consists of: its blocks, if it is a bundle, and otherwise itself."""

    names: tuple[str, ...]
    """As they are in a model without bundles."""
    sizes: tuple[int, ...]
    """Elements."""
    bundle: Bundle | None = None


def parts_of(model: nn.Module) -> dict[str, Parts]:
    """Of each parameter, by its name; tied parameters once."""
    parts = {
        name: Parts((name,), (getattr(parameter, "ds_numel", parameter.numel()),))
        for name, parameter in model.named_parameters()
    }
    for path, half in model.named_modules():
        for step, bundle in enumerate(half.all_bundles() if isinstance(half, BundledHalf) else ()):
            names = tuple(f"{path}.{name}.blocks.{step}.weight" for name in half.names)
            parts[f"{path}.bundles.{step}.weight"] = Parts(names, bundle.sizes, bundle)
    return parts
