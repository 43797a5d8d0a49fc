"""Maps each block, parameter and buffer of a nested model to its part of a Hugging Face tensor.

In: a nested model. Out: a `Slice` for each block, other parameter and persistent buffer: the rows (or columns) of a
Hugging Face tensor, and the owner. Saving, exporting, extracting and loading all use `slices_of` and `buffers_of`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sorted_ds.nested.blocks import NestedModule
from sorted_ds.nested.bundles import contents_of
from sorted_ds.nested.owned import is_owner
from sorted_ds.space import SubNet

if TYPE_CHECKING:
    from sorted_ds.nested.nest import NestedModel

OWNER_SEPARATOR = "@"
"""The separator of a tensor's name and its owner."""
COPIES = ".copies."
"""The part of a path that marks the copies of an `OwnedModule`."""


@dataclass(frozen=True)
class Slice:
    """The part of the Hugging Face tensor `name` that a parameter holds. `stop` = 0 stands for the whole tensor."""

    name: str
    start: int = 0
    stop: int = 0
    transposed: bool = False
    owner: str = ""
    """The owner of the copy, like `d4` (owned.py). It is empty for a tensor that all sub-networks share."""

    @property
    def key(self) -> str:
        """The tensor's name with its owner, which differs for the copies of a tensor: `model.norm.weight@d4`."""
        return f"{self.name}{OWNER_SEPARATOR}{self.owner}" if self.owner else self.name

    def of(self, tensor: Tensor) -> Tensor:
        """Returns this part of a whole Hugging Face tensor (or of a lazily read file), rows first."""
        if not self.stop:
            return tensor[:]
        return tensor[:, self.start : self.stop].t() if self.transposed else tensor[self.start : self.stop]


def slices_of(model: nn.Module) -> dict[str, Slice]:
    """Returns the slice of each block and other parameter, by name.

    A tied parameter occurs once, the blocks of a weight stand in order, and a bundle's blocks have the names that they
    have without bundles.
    """
    nested = {path: layer for path, layer in model.named_modules() if isinstance(layer, NestedModule)}
    slices = {}
    for name in (name for contents in contents_of(model).values() for name in contents.names):
        path, _, rest = name.partition(".blocks.")
        if not rest:
            slices[name] = slice_of(name)
            continue
        number, kind = rest.split(".")
        start, stop = nested[path].bounds[int(number)]
        slices[name] = Slice(f"{path}.{kind}", start, stop, nested[path].transposed)
    return slices


def slice_of(name: str) -> Slice:
    """Returns the slice of a parameter or buffer that has no blocks. The path of a copy contains the owner."""
    path, _, rest = name.partition(COPIES)
    owner, _, kind = rest.partition(".")
    return Slice(f"{path}.{kind}", owner=owner) if rest else Slice(name)


def buffers_of(model: nn.Module) -> dict[str, Slice]:
    """Returns the slice of each persistent buffer, by name. Other buffers follow from the config."""
    return {
        f"{path}.{name}".lstrip("."): slice_of(f"{path}.{name}".lstrip("."))
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def named_values(
    model: nn.Module, gathered: Callable[[nn.Parameter], AbstractContextManager] = nullcontext
) -> Iterator[tuple[str, Tensor]]:
    """Yields the name, as in `slices_of`, and the value of each block and other parameter.

    `gathered(parameter)` is a context in which the parameter has its values.
    """
    parameters = dict(model.named_parameters())
    for name, contents in contents_of(model).items():
        with gathered(parameters[name]):
            values = [parameters[name].detach()] if contents.bundle is None else contents.bundle.blocks()
            yield from zip(contents.names, values, strict=True)


def subnet_slices(model: "NestedModel", subnet: SubNet) -> dict[str, Slice]:
    """Returns the slices of the sub-network's parameters, with the tensors' names in the extracted model."""
    return _slices_of_subnet(model, subnet, slices_of(model))


def _slices_of_subnet(model: "NestedModel", subnet: SubNet, slices: Mapping[str, Slice]) -> dict[str, Slice]:
    prefix = f"{model.family.layers}."
    new_numbers = {number: position for position, number in enumerate(model.space.layers_of(subnet))}
    found = {}
    for name, part in slices.items():
        if not _has_width(name, part, subnet, model) or (part.owner and not is_owner(part.owner, subnet)):
            continue
        if not name.startswith(prefix):
            found[name] = replace(part, owner="")
            continue
        number, _, rest = part.name.removeprefix(prefix).partition(".")
        if int(number) in new_numbers:
            found[name] = replace(part, name=f"{prefix}{new_numbers[int(number)]}.{rest}", owner="")
    return found


def all_slices(model: "NestedModel") -> dict[str, Slice]:
    """Returns the slices of all parameters and persistent buffers. The full network's copies have no owner."""
    slices = {**slices_of(model), **buffers_of(model)}
    return {**slices, **_slices_of_subnet(model, model.space.full, slices)}


def _has_width(name: str, part: Slice, subnet: SubNet, model: nn.Module) -> bool:
    """Returns whether the sub-network is wide enough for the block."""
    if not part.stop:
        return True
    layer = model.get_submodule(name.partition(".blocks.")[0])
    assert isinstance(layer, NestedModule)
    return part.stop <= subnet[layer.width.axis] * layer.rows_per_size


def hf_buffers(model: "NestedModel", subnet: SubNet) -> dict[str, Tensor]:
    """Returns the Hugging Face tensors of a sub-network's persistent buffers."""
    values = dict(model.named_buffers())
    return {part.name: values[name] for name, part in _slices_of_subnet(model, subnet, buffers_of(model)).items()}


def hf_tensors(model: "NestedModel", subnet: SubNet, weight_of: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Returns the Hugging Face tensors of a sub-network's parameters.

    `weight_of(name)` returns the value of a parameter of the nested model; under ZeRO-3 it gathers.
    """
    slices = subnet_slices(model, subnet)
    return dict(assembled(slices, ((name, weight_of(name)) for name in slices)))


def assembled(slices: Mapping[str, Slice], weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yields (key, Hugging Face tensor) from (parameter, value), each tensor as soon as its last block was read."""
    num_blocks = Counter(part.key for part in slices.values())
    blocks: dict[str, dict[int, Tensor]] = {key: {} for key in num_blocks}
    for name, value in weights:
        part = slices[name]
        blocks[part.key][part.start] = value.detach()
        if len(blocks[part.key]) == num_blocks[part.key]:
            complete = blocks.pop(part.key)
            yield part.key, _assemble([complete[start] for start in sorted(complete)], part.transposed)


def _assemble(blocks: list[Tensor], transposed: bool) -> Tensor:
    whole = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
    return whole.t().contiguous() if transposed else whole
