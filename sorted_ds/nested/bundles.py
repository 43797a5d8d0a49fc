"""What one width step adds to a layer half, as one parameter: under ZeRO-3 each parameter has a cost of its own.

In: a nested model. Out: the same model, each of whose layer halves (attention, MLP) owns a *bundle* for each width
step: the rows that the step adds to the half's linear layers, one layer's below the other's. All of them have hidden
channels on their other side (input-side weights are stored transposed), so a bundle is a matrix [rows, hidden]. Biases
and norms stay blocks.

A half, not its linear layers, is what ZeRO-3 gathers for and releases after. Autograd sees the drawn bundles once a
half: each linear layer gets a *token* for its weight and writes the weight's gradient where those of the half lie side
by side; when all tokens' gradients have come, each bundle gets its own. A weight is looked up anew in each pass, never
kept for the backward one, since bundles come and go.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from sorted_ds.nested.classes import extended
from sorted_ds.nested.decoder_layer import NestedDecoderLayer, run_by_blocks
from sorted_ds.nested.layers import InputNestedLinear, NestedLayer, OutputNestedLinear, Width, together

HALVES = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
"""The halves of a decoder layer, and the linear layers of each, in the order of their rows in a bundle."""


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
        self._memory: StorageWeakRef | None = None
        self._starts: Sequence[int] = ()

    def lay_apart(self, memory: Tensor, stand_in: Tensor, starts: Sequence[int]) -> None:
        """The blocks lie apart in flat `memory`, each from its start on. `stand_in`: a part of it of the right size.

        The parameter keeps the memory; its own values mean nothing until it is given another.
        """
        self._memory, self._starts = StorageWeakRef(memory.untyped_storage()), starts
        self.weight.data = stand_in

    def block(self, number: int) -> Tensor:
        """The rows of one linear layer, a view, wherever they lie."""
        weight = self._parameters["weight"].data  # type: ignore[union-attr]
        start, stop = self.places[number]
        if self._memory is not None and weight.untyped_storage()._cdata == self._memory.cdata:
            return weight.as_strided((stop - start, self.hidden), (self.hidden, 1), self._starts[number])
        return weight[start:stop]

    def blocks(self) -> list[Tensor]:
        """Of all linear layers."""
        return [self.block(number) for number in range(len(self.places))]

    def __getstate__(self) -> dict:
        """A copy has memory of its own, and a weak reference is not to be copied."""
        return {**self.__dict__, "_memory": None}


class BundledHalf(nn.Module):
    """What `bundle` adds to a Hugging Face class of attention or MLP."""

    plain_forward: Callable
    """Hugging Face's own."""
    bundles: nn.ModuleList
    names: tuple[str, ...]
    """Of the linear layers."""
    linears: tuple[NestedLayer, ...]
    width: Width

    def __call__(self, hidden: Tensor | None = None, *args, hidden_states: Tensor | None = None, **kwargs):
        """Hugging Face names the attention's input, and DeepSpeed's hooks see what has no name."""
        return super().__call__(hidden_states if hidden is None else hidden, *args, **kwargs)

    def forward(self, hidden: Tensor, *args, **kwargs):
        drawn, grads = self.drawn(), _Grads(self.linears)
        tokens = _Tokens.apply(grads, *(bundle._parameters["weight"] for bundle in drawn))
        for number, (layer, token) in enumerate(zip(self.linears, tokens, strict=True)):
            layer.source = _Bundled(drawn, number, token, grads)
        try:
            return self.plain_forward(hidden, *args, **kwargs)
        finally:
            for layer in self.linears:
                layer.source = None

    def drawn(self) -> list[Bundle]:
        return list(islice(self.all_bundles(), self.width.num_steps))

    def all_bundles(self) -> Iterable[Bundle]:
        """Asked for at every use, so not by way of slow attributes."""
        return self._modules["bundles"]._modules.values()  # type: ignore[union-attr, return-value]


class _Grads:
    """Of one pass: the gradients of a half's weights, side by side."""

    def __init__(self, layers: Sequence[NestedLayer]):
        self.num_rows = [layer.drawn_rows() for layer in layers]
        """Of each block of each weight."""
        self.memory: Tensor | None = None

    def of(self, number: int, token: Tensor, hidden: int) -> Tensor:
        """Where the gradient of one weight goes."""
        sizes = [sum(rows) for rows in self.num_rows]
        if self.memory is None:
            self.memory = token.new_empty(sum(sizes), hidden)
        return self.memory.narrow(0, sum(sizes[:number]), sizes[number])

    def by_steps(self, has_grad: Sequence[bool]) -> Iterator[Tensor]:
        """Of each bundle; weights that the loss does not depend on have zeros. The memory is given away."""
        memory, self.memory = self.memory, None
        assert memory is not None
        weights = memory.split([sum(rows) for rows in self.num_rows])
        for weight, is_there in zip(weights, has_grad, strict=True):
            if not is_there:
                weight.zero_()
        if len(self.num_rows[0]) == 1:  # of one step they lie like the bundle
            return iter((memory,))
        blocks = [weight.split(rows) for weight, rows in zip(weights, self.num_rows, strict=True)]
        return map(torch.cat, zip(*blocks, strict=True))


class _Tokens(torch.autograd.Function):
    """The drawn bundles as one empty tensor for each of the half's weights."""

    @staticmethod
    def forward(ctx, grads: _Grads, *bundles: Tensor) -> tuple[Tensor, ...]:
        ctx.grads = grads
        ctx.set_materialize_grads(False)
        return tuple(bundles[0].new_empty(0) for _ in grads.num_rows)

    @staticmethod
    def backward(ctx, *tokens: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.grads.by_steps([token is not None for token in tokens])


@dataclass(slots=True)
class _Bundled:
    """A weight of the drawn bundles, in one pass."""

    drawn: list[Bundle]
    number: int
    token: Tensor
    grads: _Grads

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.token,)

    def matrix(self) -> Tensor:
        return together([bundle.block(self.number) for bundle in self.drawn])

    def gradients(self, left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
        torch.mm(left, right, out=self.grads.of(self.number, self.token, right.shape[1]))
        return (self.token.detach(),)


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
        if isinstance(layer, NestedDecoderLayer):
            layer.run = run_by_blocks
            for name, linears in HALVES.items():
                half = getattr(layer, name)
                if not isinstance(half, BundledHalf):
                    _bundle_half(half, linears)


def _bundle_half(half: nn.Module, names: tuple[str, ...]) -> None:
    linears = tuple(getattr(half, name) for name in names)
    half.__class__ = extended(type(half), BundledHalf, plain_forward=type(half).forward)
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


def bundles_in(model: nn.Module) -> dict[str, tuple[Bundle, list[str]]]:
    """By parameter name: the bundle, and the names that its blocks have in a model without bundles."""
    halves = ((path, module) for path, module in model.named_modules() if isinstance(module, BundledHalf))
    return {
        f"{path}.bundles.{step}.weight": (own, [f"{path}.{name}.blocks.{step}.weight" for name in half.names])
        for path, half in halves
        for step, own in enumerate(half.all_bundles())
    }
