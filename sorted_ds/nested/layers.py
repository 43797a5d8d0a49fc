"""Layers whose weights are stored as blocks, one per width step, and run on a prefix of them.

In: activations of the drawn width. Out: the same layer's output at that width. The weight of a layer is a list of
*blocks*, each an `nn.Module` that owns the rows that one width step adds. Where the blocks lie side by side in memory,
a prefix of them is one matrix, used without a copy; otherwise they are copied together for the time of a product.
Under ZeRO-3 (`Width.join` off) that matrix is made anew in each pass, and never kept: blocks come and go.

Legend: rows = the nested dimension (heads or feed-forward channels), always the first dimension of a block;
a weight that is nested on its input side is therefore stored transposed, [in, out]. N = positions.
"""

from collections.abc import Sequence
from itertools import islice, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Width:
    """The drawn width of one dimension, shared by every layer that is nested in it. Changing it costs one assignment.

    `sizes` are the sizes that the space trains, ascending; `num_steps` of them are drawn now.
    """

    def __init__(self, sizes: Sequence[int]):
        self.sizes = tuple(sizes)
        self.num_steps = len(self.sizes)
        self.join = True
        """Let autograd keep a decoder layer's blocks as one matrix. Off under ZeRO-3, where blocks come and go."""

    @property
    def size(self) -> int:
        return self.sizes[self.num_steps - 1]

    def select(self, size: int) -> None:
        self.num_steps = self.sizes.index(size) + 1


def as_one(blocks: Sequence[Tensor]) -> Tensor:
    """A view of blocks that are neighbours."""
    first = blocks[0].detach()
    return first.as_strided((sum(map(len, blocks)), *first.shape[1:]), first.stride(), first.storage_offset())


def are_adjacent(blocks: Sequence[Tensor]) -> bool:
    """Whether the blocks follow each other, without gap, in one storage.

    Asked at every use (under 1 us a block): `deepcopy`, `.to()` and reordered flat buffers change the answer, and a
    remembered one would read other weights silently.
    """
    end = blocks[0].data_ptr()
    for block in blocks:
        if block.data_ptr() != end or not block.is_contiguous():
            return False
        end += block.nbytes
    # Neighbours in memory, and all in one piece of it if the first and the last are.
    return end > blocks[0].data_ptr() and _storage(blocks[0]) == _storage(blocks[-1])


def _storage(block: Tensor) -> int:
    return block.untyped_storage().data_ptr()


class _BlockedOutput(torch.autograd.Function):
    """`x @ weight.t() + bias` with the blocks of both put together for as long as the product takes.

    Saves the blocks themselves: under ZeRO-3 they are released after the forward pass and gathered again for this one.
    One product, not one a block, so that bf16 rounds a sum once. `biases` follow the weights, or are none.
    Shapes: [N, in], [rows, in] each, [rows] each -> [N, all rows].
    """

    @staticmethod
    def forward(ctx, x: Tensor, *blocks: Tensor) -> Tensor:
        weights = [block for block in blocks if block.dim() == 2]
        biases = blocks[len(weights) :]
        ctx.rows, ctx.has_bias = [len(weight) for weight in weights], bool(biases)
        ctx.save_for_backward(x, *weights)
        return F.linear(x, _together(weights), _together(biases) if biases else None)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        grad_x = grad @ _together(weights) if ctx.needs_input_grad[0] else None
        grad_bias = grad.sum(0).split(ctx.rows) if ctx.has_bias else ()
        return grad_x, *(grad.t() @ x).split(ctx.rows), *grad_bias


class _BlockedInput(torch.autograd.Function):
    """`x @ weight`, likewise.

    Shapes: [N, all rows], [rows, out] each -> [N, out].
    """

    @staticmethod
    def forward(ctx, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.rows = [len(weight) for weight in weights]
        ctx.save_for_backward(x, *weights)
        return x @ _together(weights)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        grad_x = grad @ _together(weights).t() if ctx.needs_input_grad[0] else None
        return grad_x, *(x.t() @ grad).split(ctx.rows)


def _together(blocks: Sequence[Tensor]) -> Tensor:
    """As one tensor: a copy, unless they are neighbours."""
    return as_one(blocks) if are_adjacent(blocks) else torch.cat(list(blocks))


class Block(nn.Module):
    """The rows that one width step adds to a layer, apart from the layer itself.

    Apart, because ZeRO-3 gathers all that a called module owns.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)


class NestedLayer(nn.Module):
    """What nested layers share: the blocks, and the prefix of them that is drawn."""

    transposed = False
    """Whether the blocks' rows are the columns of the Hugging Face weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None, width: Width, rows_per_size: int):
        """Cuts `weight` (rows first) into blocks that are views of it: no copy, and side by side in memory."""
        super().__init__()
        self.width = width
        self.rows_per_size = rows_per_size
        self.has_bias = bias is not None
        self.names = ("weight", "bias") if self.has_bias else ("weight",)
        """Of the parameters of a block."""
        self.given: dict[str, Tensor] = {}
        """The drawn parameters as one tensor each, while a decoder layer runs; what is missing is used by blocks."""
        bounds = [0, *(size * rows_per_size for size in width.sizes)]
        self.bounds = list(pairwise(bounds))
        self.blocks = nn.ModuleList(
            Block(weight[start:stop], None if bias is None else bias[start:stop]) for start, stop in self.bounds
        )

    def values(self, name: str) -> list[Tensor]:
        """The parameter `name` of each drawn block. Asked for at every use, so not by way of slow attributes."""
        drawn = islice(self._modules["blocks"]._modules.values(), self.width.num_steps)  # type: ignore[union-attr]
        return [block._parameters[name] for block in drawn]  # type: ignore[union-attr, misc]

    def drawn_rows(self) -> list[int]:
        return [stop - start for start, stop in self.bounds[: self.width.num_steps]]

    def extra_repr(self) -> str:
        return f"rows={[stop for _, stop in self.bounds]}"


class OutputNestedLinear(NestedLayer):
    """A linear layer with a prefix of its output features: query, key, value, gate and up projections.

    Shapes: [..., in] -> [..., rows drawn].
    """

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.given.get("weight"), self.given.get("bias")
        if weight is not None and (bias is not None or not self.has_bias):
            return F.linear(x, weight, bias)
        biases = self.values("bias") if self.has_bias else []
        return _BlockedOutput.apply(x.flatten(0, -2), *self.values("weight"), *biases).unflatten(0, x.shape[:-1])


class InputNestedLinear(NestedLayer):
    """A linear layer over a prefix of its input features: attention output and down projections.

    Shapes: [..., rows drawn] -> [..., out]. The bias belongs to the outputs, so it is not nested.
    """

    transposed = True

    def __init__(self, weight: Tensor, bias: Tensor | None, width: Width, rows_per_size: int):
        super().__init__(weight, None, width, rows_per_size)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.given.get("weight")
        if weight is not None:
            y = x @ weight
        else:
            y = _BlockedInput.apply(x.flatten(0, -2), *self.values("weight")).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


class NestedRMSNorm(NestedLayer):
    """The root mean square norm over all drawn heads (OLMo 2), scaled in fp32 as `Olmo2RMSNorm` does.

    Shapes: [..., rows drawn] -> the same. Source: transformers 5.24, models/olmo2/modeling_olmo2.py.
    """

    def __init__(self, weight: Tensor, eps: float, width: Width, rows_per_size: int):
        super().__init__(weight, None, width, rows_per_size)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float()
        normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + self.eps)
        weight = self.given.get("weight")
        if weight is not None:
            return (weight * normed).to(x.dtype)
        parts = normed.split(self.drawn_rows(), dim=-1)
        scaled = [weight * part for weight, part in zip(self.values("weight"), parts, strict=True)]
        return torch.cat(scaled, dim=-1).to(x.dtype)
