"""Layers whose weights are stored as blocks, one per width step, and run on a prefix of them.

In: activations of the active width. Out: the same layer's output at that width. The weight of a layer is a list of
*blocks*, each an `nn.Module` that owns the rows that one width step adds. Where the blocks lie side by side in memory,
a prefix of them is one matrix, used without a copy; otherwise they are copied together for the time of a product.
Under ZeRO-3 blocks are parts of bundles (bundles.py), and that matrix is made anew in each pass, and never kept.

Legend: rows = the nested dimension (heads or feed-forward channels), always the first dimension of a block;
a weight that is nested on its input side is therefore stored transposed, [in, out]. N = positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Width:
    """The active width of one dimension, shared by every layer that is nested in it. Changing it costs one assignment.

    `axis` is its letter; `sizes` are the sizes that the space trains, ascending; `num_steps` of them are active now.
    """

    def __init__(self, axis: str, sizes: Sequence[int]):
        self.axis = axis
        self.sizes = tuple(sizes)
        self.num_steps = len(self.sizes)

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


def together(blocks: Sequence[Tensor]) -> Tensor:
    """As one tensor: a copy, unless they are neighbours."""
    return as_one(blocks) if are_adjacent(blocks) else torch.cat(list(blocks))


class Source(Protocol):
    """Where a product finds its weight, in the forward pass and again in the backward one."""

    def tensors(self) -> tuple[Tensor, ...]:
        """What autograd sees of the weight."""
        ...

    def matrix(self) -> Tensor:
        """The active rows: [rows, other side]. For as long as a product takes."""
        ...

    def gradients(self, left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
        """Of `tensors()`; that of the matrix is `left @ right`."""
        ...


@dataclass(slots=True)
class _Blocks:
    """Blocks that are put together as long as a product takes."""

    weights: list[Tensor]

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(self.weights)

    def matrix(self) -> Tensor:
        return together(self.weights)

    def gradients(self, left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
        return (left @ right).split([len(weight) for weight in self.weights])


class _OutputProduct(torch.autograd.Function):
    """`x @ weight.t() + bias`. One product, not one a block, so that bf16 rounds a sum once.

    Shapes: [N, in], [rows], `source.tensors()` -> [N, rows].
    """

    @staticmethod
    def forward(ctx, source: Source, x: Tensor, bias: Tensor | None, *tensors: Tensor) -> Tensor:
        ctx.source, ctx.has_bias = source, bias is not None
        ctx.save_for_backward(x)
        return F.linear(x, source.matrix(), bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad_x = grad @ ctx.source.matrix() if ctx.needs_input_grad[1] else None
        return None, grad_x, grad.sum(0) if ctx.has_bias else None, *ctx.source.gradients(grad.t(), x)


class _InputProduct(torch.autograd.Function):
    """`x @ weight`, likewise.

    Shapes: [N, rows], `source.tensors()` -> [N, out].
    """

    @staticmethod
    def forward(ctx, source: Source, x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.source = source
        ctx.save_for_backward(x)
        return x @ source.matrix()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad_x = grad @ ctx.source.matrix().t() if ctx.needs_input_grad[1] else None
        return None, grad_x, *ctx.source.gradients(x.t(), grad)


class Block(nn.Module):
    """The rows that one width step adds to a layer, apart from the layer itself.

    Apart, because ZeRO-3 gathers all that a called module owns.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)


class NestedModule(nn.Module):
    """What nested layers share: the blocks, and the prefix of them that is active."""

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
        self.source: Source | None = None
        """Of the weight, while a half that owns it runs (bundles.py)."""
        self.given: dict[str, Tensor] = {}
        """The active parameters as one tensor each, while a decoder layer runs; what is missing is used by blocks."""
        bounds = [0, *(size * rows_per_size for size in width.sizes)]
        self.bounds = list(pairwise(bounds))
        self.blocks = nn.ModuleList(
            Block(weight[start:stop], None if bias is None else bias[start:stop]) for start, stop in self.bounds
        )

    def values(self, name: str) -> list[Tensor]:
        """The parameter `name` of each active block. Asked for at every use, so not by way of slow attributes."""
        active = islice(self._modules["blocks"]._modules.values(), self.width.num_steps)  # type: ignore[union-attr]
        return [block._parameters[name] for block in active]  # type: ignore[union-attr, misc]

    def active_rows(self) -> list[int]:
        """Of each active block."""
        return [stop - start for start, stop in self.bounds[: self.width.num_steps]]

    def active_source(self) -> Source:
        """Of a weight that is not given as one tensor."""
        return self.source or _Blocks(self.values("weight"))

    def extra_repr(self) -> str:
        return f"rows={[stop for _, stop in self.bounds]}"


class OutputNestedLinear(NestedModule):
    """A linear layer with a prefix of its output features: query, key, value, gate and up projections.

    Shapes: [..., in] -> [..., rows active].
    """

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.given.get("weight"), self.given.get("bias")
        if bias is None and self.has_bias:
            bias = torch.cat(self.values("bias"))
        if weight is not None:
            return F.linear(x, weight, bias)
        source = self.active_source()
        return _OutputProduct.apply(source, x.flatten(0, -2), bias, *source.tensors()).unflatten(0, x.shape[:-1])


class InputNestedLinear(NestedModule):
    """A linear layer over a prefix of its input features: attention output and down projections.

    Shapes: [..., rows active] -> [..., out]. The bias belongs to the outputs, so it is not nested.
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
            source = self.active_source()
            y = _InputProduct.apply(source, x.flatten(0, -2), *source.tensors()).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


class NestedRMSNorm(NestedModule):
    """The root mean square norm over all active heads (OLMo 2), scaled in fp32 as `Olmo2RMSNorm` does.

    Shapes: [..., rows active] -> the same. Source: transformers 5.24, models/olmo2/modeling_olmo2.py.
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
        parts = normed.split(self.active_rows(), dim=-1)
        scaled = [weight * part for weight, part in zip(self.values("weight"), parts, strict=True)]
        return torch.cat(scaled, dim=-1).to(x.dtype)
