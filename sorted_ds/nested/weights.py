"""Between blocks and Hugging Face tensors: one pure table, read in both directions.

In: a nested model. Out: for each of its blocks, and other parameters, which rows (or columns) of which Hugging Face
tensor it is.
Saving, exporting, extracting and loading all go through `slices_of`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sorted_ds.nested.bundles import parts_of
from sorted_ds.nested.layers import NestedLayer
from sorted_ds.space import SubNet

LAYERS_PREFIX = "model.layers."


@dataclass(frozen=True)
class Slice:
    """Which part of the Hugging Face tensor `name` a parameter holds; `stop` = 0 means all of it."""

    name: str
    start: int = 0
    stop: int = 0
    transposed: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """This part of the whole Hugging Face tensor (or of a lazily read slice of a file), rows first."""
        if not self.stop:
            return tensor[:]
        return tensor[:, self.start : self.stop].t() if self.transposed else tensor[self.start : self.stop]


def slices_of(model: nn.Module) -> dict[str, Slice]:
    """Block, or other parameter -> the part of a Hugging Face tensor that it is.

    Tied parameters once, blocks of a weight in order, and blocks of a bundle (bundles.py) as if there was none.
    """
    nested = {path: layer for path, layer in model.named_modules() if isinstance(layer, NestedLayer)}
    slices = {}
    for name in (name for parts in parts_of(model).values() for name in parts.names):
        path, _, rest = name.partition(".blocks.")
        if not rest:
            slices[name] = Slice(name)
            continue
        number, kind = rest.split(".")
        start, stop = nested[path].bounds[int(number)]
        slices[name] = Slice(f"{path}.{kind}", start, stop, nested[path].transposed)
    return slices


def named_values(
    model: nn.Module, gathered: Callable[[nn.Parameter], AbstractContextManager] = nullcontext
) -> Iterator[tuple[str, Tensor]]:
    """Names as in `slices_of`, and values. `gathered(parameter)`: a context in which a parameter is there."""
    parameters = dict(model.named_parameters())
    for name, parts in parts_of(model).items():
        with gathered(parameters[name]):
            values = [parameters[name].detach()] if parts.bundle is None else parts.bundle.blocks()
            yield from zip(parts.names, values, strict=True)


def is_active(name: str, part: Slice, subnet: SubNet, model: nn.Module) -> bool:
    """Whether the parameter `name` belongs to the sub-network: its layer and its width step are active."""
    if name.startswith(LAYERS_PREFIX) and int(name.removeprefix(LAYERS_PREFIX).split(".")[0]) >= subnet.depth:
        return False
    if not part.stop:
        return True
    layer = model.get_submodule(name.partition(".blocks.")[0])
    assert isinstance(layer, NestedLayer)
    size = subnet.groups if layer.width is model.group_width else subnet.ffn
    return part.stop <= size * layer.rows_per_size


def hf_tensors(model: nn.Module, subnet: SubNet, weight_of: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The Hugging Face tensors of a sub-network.

    `weight_of(name)` gives the value of a parameter of the nested model; under ZeRO-3 it gathers.
    """
    active = active_slices(model, subnet)
    return dict(assembled(active, ((name, weight_of(name)) for name in active)))


def active_slices(model: nn.Module, subnet: SubNet) -> dict[str, Slice]:
    """`slices_of` the sub-network's parameters."""
    return {name: part for name, part in slices_of(model).items() if is_active(name, part, subnet, model)}


def assembled(active: Mapping[str, Slice], weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face tensors of (parameter, value), each as soon as the last of its blocks has come."""
    num_blocks = Counter(part.name for part in active.values())
    blocks: dict[str, dict[int, Tensor]] = {name: {} for name in num_blocks}
    for name, value in weights:
        part = active[name]
        blocks[part.name][part.start] = value.detach()
        if len(blocks[part.name]) == num_blocks[part.name]:
            come = blocks.pop(part.name)
            yield part.name, _assemble([come[start] for start in sorted(come)], part.transposed)


def _assemble(blocks: list[Tensor], transposed: bool) -> Tensor:
    whole = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
    return whole.t().contiguous() if transposed else whole
