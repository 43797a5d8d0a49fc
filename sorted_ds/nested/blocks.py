"""Layers whose weights are stored as blocks, one per width step, and that run on a prefix of the blocks.

In: activations of the active width. Out: the layer's output at that width. The weight of a layer is a list of *blocks*.
Each block is an `nn.Module` that owns the rows that one width step adds. If the active blocks are adjacent in memory,
they are used as one matrix without a copy; otherwise they are copied into one matrix for the time of a product. Under
ZeRO-3 the weights lie in bundles (bundles.py), and each pass makes the matrix anew.

Legend: rows = the nested dimension (heads or feed-forward channels). They are always the first dimension of a block, so
a weight that is nested on its input side is stored transposed, [in, out]. N = positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Width:
    """The active width along one axis, shared by every layer that is nested along it.

    `axis` is the axis's letter, `sizes` are the sizes in the space, ascending, and `num_steps` of them are active.
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


def joined_view(blocks: Sequence[Tensor]) -> Tensor:
    """Returns adjacent blocks as one view."""
    first = blocks[0].detach()
    return first.as_strided((sum(map(len, blocks)), *first.shape[1:]), first.stride(), first.storage_offset())


def are_adjacent(blocks: Sequence[Tensor]) -> bool:
    """Returns whether the blocks follow each other without a gap in one storage.

    This is checked at every use (under 1 us a block): `deepcopy`, `.to()` and reordered flat buffers change the answer,
    and a stored answer would silently read other weights.
    """
    end = blocks[0].data_ptr()
    for block in blocks:
        if block.data_ptr() != end or not block.is_contiguous():
            return False
        end += block.nbytes
    # Blocks that follow each other lie in one storage if the first and the last block do.
    return end > blocks[0].data_ptr() and _storage(blocks[0]) == _storage(blocks[-1])


def _storage(block: Tensor) -> int:
    return block.untyped_storage().data_ptr()


def join(blocks: Sequence[Tensor]) -> Tensor:
    """Returns the blocks as one tensor: a view if they are adjacent, and otherwise a copy."""
    return joined_view(blocks) if are_adjacent(blocks) else torch.cat(list(blocks))


class ActiveWeight(Protocol):
    """The active weight of a product, which is looked up in the forward pass and again in the backward pass."""

    def autograd_inputs(self) -> tuple[Tensor, ...]:
        """Returns the tensors that stand for the weight in autograd's graph."""
        ...

    def matrix(self) -> Tensor:
        """Returns the active rows, [rows, other side]. Nobody may keep the matrix after the product."""
        ...

    def gradients(self, left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
        """Returns the gradients of `autograd_inputs()`, given that the matrix has the gradient `left @ right`."""
        ...


@dataclass(slots=True)
class _BlockWeight:
    """An active weight whose blocks are joined for the time of a product."""

    blocks: list[Tensor]

    def autograd_inputs(self) -> tuple[Tensor, ...]:
        return tuple(self.blocks)

    def matrix(self) -> Tensor:
        return join(self.blocks)

    def gradients(self, left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
        return (left @ right).split([len(block) for block in self.blocks])


class _OutputProduct(torch.autograd.Function):
    """Computes `x @ weight.t() + bias` as one product, not one per block, so that bf16 rounds each sum once.

    Shapes: [N, in], [rows], `weight.autograd_inputs()` -> [N, rows].
    """

    @staticmethod
    def forward(ctx, weight: ActiveWeight, x: Tensor, bias: Tensor | None, *tensors: Tensor) -> Tensor:
        ctx.weight, ctx.has_bias = weight, bias is not None
        ctx.save_for_backward(x)
        return F.linear(x, weight.matrix(), bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad_x = grad @ ctx.weight.matrix() if ctx.needs_input_grad[1] else None
        return None, grad_x, grad.sum(0) if ctx.has_bias else None, *ctx.weight.gradients(grad.t(), x)


class _InputProduct(torch.autograd.Function):
    """Computes `x @ weight` as one product.

    Shapes: [N, rows], `weight.autograd_inputs()` -> [N, out].
    """

    @staticmethod
    def forward(ctx, weight: ActiveWeight, x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(x)
        return x @ weight.matrix()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad_x = grad @ ctx.weight.matrix().t() if ctx.needs_input_grad[1] else None
        return None, grad_x, *ctx.weight.gradients(x.t(), grad)


class Block(nn.Module):
    """The rows that one width step adds to a layer.

    A block is a module of its own, because ZeRO-3 gathers all parameters that a called module owns.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)


class NestedModule(nn.Module):
    """A layer that stores its weight as blocks and runs on the active prefix of them."""

    transposed = False
    """Whether the blocks' rows are the columns of the Hugging Face weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None, width: Width, rows_per_size: int):
        """Cuts `weight` (rows first) into adjacent blocks that are views of it."""
        super().__init__()
        self.width = width
        self.rows_per_size = rows_per_size
        self.has_bias = bias is not None
        self.parameter_names = ("weight", "bias") if self.has_bias else ("weight",)
        """The names of a block's parameters."""
        self.bundled_weight: ActiveWeight | None = None
        """The active weight in bundles, set while a layer half that owns bundles runs (bundles.py)."""
        self.joined: dict[str, Tensor] = {}
        """The active part of each parameter as one tensor, set while a layer runs. Missing ones are used as blocks."""
        bounds = [0, *(size * rows_per_size for size in width.sizes)]
        self.bounds = list(pairwise(bounds))
        self.blocks = nn.ModuleList(
            Block(weight[start:stop], None if bias is None else bias[start:stop]) for start, stop in self.bounds
        )

    def active_blocks(self, name: str) -> list[Tensor]:
        """Returns the parameter `name` of each active block."""
        # Every use of a weight comes here, so the slow attribute lookup of nn.Module is avoided.
        active = islice(self._modules["blocks"]._modules.values(), self.width.num_steps)  # type: ignore[union-attr]
        return [block._parameters[name] for block in active]  # type: ignore[union-attr, misc]

    def active_rows(self) -> list[int]:
        """Returns the number of rows of each active block."""
        return [stop - start for start, stop in self.bounds[: self.width.num_steps]]

    def active_weight(self) -> ActiveWeight:
        """Returns the active weight, for a layer whose `joined` has no weight."""
        return self.bundled_weight or _BlockWeight(self.active_blocks("weight"))

    def extra_repr(self) -> str:
        return f"rows={[stop for _, stop in self.bounds]}"


class OutputNestedLinear(NestedModule):
    """A linear layer that computes a prefix of its output features: query, key, value, gate and up projections.

    Shapes: [..., in] -> [..., active rows].
    """

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.joined.get("weight"), self.joined.get("bias")
        if bias is None and self.has_bias:
            bias = torch.cat(self.active_blocks("bias"))
        if weight is not None:
            return F.linear(x, weight, bias)
        active = self.active_weight()
        y = _OutputProduct.apply(active, x.flatten(0, -2), bias, *active.autograd_inputs())
        return y.unflatten(0, x.shape[:-1])


class InputNestedLinear(NestedModule):
    """A linear layer that reads a prefix of its input features: attention output and down projections.

    Shapes: [..., active rows] -> [..., out]. The bias belongs to the outputs, so it is not nested.
    """

    transposed = True

    def __init__(self, weight: Tensor, bias: Tensor | None, width: Width, rows_per_size: int):
        super().__init__(weight, None, width, rows_per_size)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.joined.get("weight")
        if weight is not None:
            y = x @ weight
        else:
            active = self.active_weight()
            y = _InputProduct.apply(active, x.flatten(0, -2), *active.autograd_inputs()).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


class NestedRMSNorm(NestedModule):
    """The root mean square norm over all active heads (OLMo 2), scaled in fp32 like `Olmo2RMSNorm`.

    Shapes: [..., active rows] -> the same. Source: transformers 5.24, models/olmo2/modeling_olmo2.py.
    """

    def __init__(self, weight: Tensor, eps: float, width: Width, rows_per_size: int):
        super().__init__(weight, None, width, rows_per_size)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float()
        normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + self.eps)
        weight = self.joined.get("weight")
        if weight is not None:
            return (weight * normed).to(x.dtype)
        parts = normed.split(self.active_rows(), dim=-1)
        scaled = [weight * part for weight, part in zip(self.active_blocks("weight"), parts, strict=True)]
        return torch.cat(scaled, dim=-1).to(x.dtype)
