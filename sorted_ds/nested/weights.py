"""Between blocks and Hugging Face tensors: one pure table, read in both directions.

In: a nested model. Out: for each of its blocks, and of its other parameters and buffers, which rows (or columns) of
which Hugging Face tensor it is, and which sub-networks own it. Saving, exporting, extracting and loading all go through
`slices_of` and `buffers_of`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sorted_ds.nested.blocks import NestedModule
from sorted_ds.nested.bundles import parts_of
from sorted_ds.nested.owned import is_owner
from sorted_ds.space import SubNet

if TYPE_CHECKING:
    from sorted_ds.nested.nest import NestedModel

OWNED_BY = "@"
"""Between a tensor's name and its owner."""
COPIES = ".copies."
"""In the paths of an `OwnedModule`'s copies."""


@dataclass(frozen=True)
class Slice:
    """Which part of the Hugging Face tensor `name` a parameter holds; `stop` = 0 means all of it."""

    name: str
    start: int = 0
    stop: int = 0
    transposed: bool = False
    owner: str = ""
    """Whose copy of the tensor it is, like `d4` (owned.py); empty for a tensor that all sub-networks share."""

    @property
    def key(self) -> str:
        """The name under which it is kept where copies of all owners lie beside each other."""
        return f"{self.name}{OWNED_BY}{self.owner}" if self.owner else self.name

    def of(self, tensor: Tensor) -> Tensor:
        """This part of the whole Hugging Face tensor (or of a lazily read slice of a file), rows first."""
        if not self.stop:
            return tensor[:]
        return tensor[:, self.start : self.stop].t() if self.transposed else tensor[self.start : self.stop]


def slices_of(model: nn.Module) -> dict[str, Slice]:
    """Block, or other parameter -> the part of a Hugging Face tensor that it is.

    Tied parameters once, blocks of a weight in order, and blocks of a bundle (bundles.py) as if there was none.
    """
    nested = {path: layer for path, layer in model.named_modules() if isinstance(layer, NestedModule)}
    slices = {}
    for name in (name for parts in parts_of(model).values() for name in parts.names):
        path, _, rest = name.partition(".blocks.")
        if not rest:
            slices[name] = _whole(name)
            continue
        number, kind = rest.split(".")
        start, stop = nested[path].bounds[int(number)]
        slices[name] = Slice(f"{path}.{kind}", start, stop, nested[path].transposed)
    return slices


def _whole(name: str) -> Slice:
    """A parameter or buffer that is not cut into blocks; the path of a copy names its owner."""
    path, _, rest = name.partition(COPIES)
    owner, _, kind = rest.partition(".")
    return Slice(f"{path}.{kind}", owner=owner) if rest else Slice(name)


def buffers_of(model: nn.Module) -> dict[str, Slice]:
    """Persistent buffer -> the Hugging Face tensor that it is. Other buffers follow from the config."""
    return {
        f"{path}.{name}".lstrip("."): _whole(f"{path}.{name}".lstrip("."))
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def named_values(
    model: nn.Module, gathered: Callable[[nn.Parameter], AbstractContextManager] = nullcontext
) -> Iterator[tuple[str, Tensor]]:
    """Names as in `slices_of`, and values. `gathered(parameter)`: a context in which a parameter is there."""
    parameters = dict(model.named_parameters())
    for name, parts in parts_of(model).items():
        with gathered(parameters[name]):
            values = [parameters[name].detach()] if parts.bundle is None else parts.bundle.blocks()
            yield from zip(parts.names, values, strict=True)


def subnet_slices(model: "NestedModel", subnet: SubNet) -> dict[str, Slice]:
    """`slices_of` the sub-network's parameters, with the names that they have in the plain, smaller model."""
    return _of_subnet(model, subnet, slices_of(model))


def _of_subnet(model: "NestedModel", subnet: SubNet, slices: Mapping[str, Slice]) -> dict[str, Slice]:
    prefix = f"{model.family.layers}."
    places = {number: place for place, number in enumerate(model.space.layers_of(subnet))}
    found = {}
    for name, part in slices.items():
        if not _has_width(name, part, subnet, model) or (part.owner and not is_owner(part.owner, subnet)):
            continue
        if not name.startswith(prefix):
            found[name] = replace(part, owner="")
            continue
        number, _, rest = part.name.removeprefix(prefix).partition(".")
        if int(number) in places:
            found[name] = replace(part, name=f"{prefix}{places[int(number)]}.{rest}", owner="")
    return found


def all_slices(model: "NestedModel") -> dict[str, Slice]:
    """Everything that the model holds, parameters and persistent buffers; the full network's under its plain name."""
    slices = {**slices_of(model), **buffers_of(model)}
    return {**slices, **_of_subnet(model, model.space.full, slices)}


def _has_width(name: str, part: Slice, subnet: SubNet, model: nn.Module) -> bool:
    """Whether the sub-network is as wide as the block's width step."""
    if not part.stop:
        return True
    layer = model.get_submodule(name.partition(".blocks.")[0])
    assert isinstance(layer, NestedModule)
    return part.stop <= subnet[layer.width.axis] * layer.rows_per_size


def hf_buffers(model: "NestedModel", subnet: SubNet) -> dict[str, Tensor]:
    """The Hugging Face tensors of a sub-network's persistent buffers."""
    values = dict(model.named_buffers())
    return {part.name: values[name] for name, part in _of_subnet(model, subnet, buffers_of(model)).items()}


def hf_tensors(model: "NestedModel", subnet: SubNet, weight_of: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The Hugging Face tensors of a sub-network's parameters.

    `weight_of(name)` gives the value of a parameter of the nested model; under ZeRO-3 it gathers.
    """
    slices = subnet_slices(model, subnet)
    return dict(assembled(slices, ((name, weight_of(name)) for name in slices)))


def assembled(slices: Mapping[str, Slice], weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yields (key of a Hugging Face tensor, the tensor) from (parameter, value), as soon as its last block has come."""
    num_blocks = Counter(part.key for part in slices.values())
    blocks: dict[str, dict[int, Tensor]] = {key: {} for key in num_blocks}
    for name, value in weights:
        part = slices[name]
        blocks[part.key][part.start] = value.detach()
        if len(blocks[part.key]) == num_blocks[part.key]:
            come = blocks.pop(part.key)
            yield part.key, _assemble([come[start] for start in sorted(come)], part.transposed)


def _assemble(blocks: list[Tensor], transposed: bool) -> Tensor:
    whole = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
    return whole.t().contiguous() if transposed else whole
