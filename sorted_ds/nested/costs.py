"""Counts parameters, FLOPs and cache bytes of each sub-network on the family's own modules.

In: a Hugging Face config, its family and a space. Out: the `Cost` of every sub-network, and the space sorted by costs.
The parameters are counted on a model with one layer on the meta device (no memory, a few ms), so a new family needs no
formula for them.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig

from sorted_ds.nested.family import Family, Half, layers_of
from sorted_ds.space import Cost, SubNet, SubNetSpace

KV_BYTES_PER_ELEMENT = 2


def costs_of(
    subnets: Iterable[SubNet], family: Family, config: PreTrainedConfig, row_tokens: int
) -> dict[SubNet, Cost]:
    """Returns the cost of every sub-network. Attention is counted over `row_tokens` positions."""
    counts = _LayerCounts(family, config)
    return {subnet: counts.cost(subnet, row_tokens) for subnet in subnets}


def head_flops(family: Family, config: PreTrainedConfig) -> int:
    """Returns the forward FLOPs of the head for one token. They are part of every sub-network's."""
    return 2 * _LayerCounts(family, config).head_products


def union_parameters(steps: Iterable[Sequence[SubNet]], family: Family, config: PreTrainedConfig) -> list[int]:
    """Returns, for each step, the number of parameters that at least one of its sub-networks uses."""
    counts = _LayerCounts(family, config)
    return [counts.union(subnets) for subnets in steps]


def sorted_by_cost(space: SubNetSpace, family: Family, config: PreTrainedConfig) -> SubNetSpace:
    """Returns the space in ascending order of parameters. Ties are sorted by the sizes."""
    costs = costs_of(space, family, config, row_tokens=1)
    return space.sorted_by(lambda subnet: (costs[subnet].parameters, subnet))


class _LayerCounts:
    """The numbers of parameters of one layer, by the axis along which they grow, and of the rest of the network."""

    def __init__(self, family: Family, config: PreTrainedConfig):
        self.family, self.config = family, config
        full = family.full(config)
        self.widths = tuple(letter for letter in family.axes if letter != "d")
        with torch.device("meta"):
            one_layer = family.subnet_config(config, full.replace(d=1), layers=[0])
            model = family.auto_class.from_config(one_layer, trust_remote_code=False)
        layer = layers_of(model, family)[0]
        self.parameters = dict.fromkeys(self.widths, 0)
        self.products = dict.fromkeys(self.widths, 0)
        for half in family.halves(config):
            nested = _nested_parameters(layer, half)
            self.parameters[half.axis] += _numel(nested) // full[half.axis]
            self.products[half.axis] += _matrix_numel(nested) // full[half.axis]
        self.fixed_per_layer = _numel(layer.parameters()) - sum(self.parameters[a] * full[a] for a in self.widths)
        self.outside_layers = _numel(model.parameters()) - _numel(layer.parameters())
        head = model.get_submodule(family.head)
        embeddings = [p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()]
        ends = {id(p): p for p in (*embeddings, *head.parameters())}
        self.outside_layers_and_ends = self.outside_layers - _numel(ends.values())
        self.head_products = head.weight.numel()

    def layer_parameters(self, subnet: SubNet) -> int:
        return self.fixed_per_layer + sum(self.parameters[letter] * subnet[letter] for letter in self.widths)

    def union(self, subnets: Sequence[SubNet]) -> int:
        total, lower = self.outside_layers, 0
        for depth in sorted({subnet.depth for subnet in subnets}):
            deep = [subnet for subnet in subnets if subnet.depth >= depth]
            widest = deep[0].replace(**{letter: max(subnet[letter] for subnet in deep) for letter in self.widths})
            total += (depth - lower) * self.layer_parameters(widest)
            lower = depth
        return total

    def cost(self, subnet: SubNet, row_tokens: int) -> Cost:
        layers = subnet.depth * self.layer_parameters(subnet)
        products = sum(self.products[letter] * subnet[letter] for letter in self.widths)
        mixing = self.family.mixing_flops(self.config, subnet, row_tokens)
        kv_elements = self.family.kv_elements(self.config, subnet)
        return Cost(
            parameters=self.outside_layers + layers,
            non_embedding_parameters=self.outside_layers_and_ends + layers,
            flops_per_token=2 * (self.head_products + subnet.depth * products) + subnet.depth * mixing,
            kv_bytes_per_token=subnet.depth * kv_elements * KV_BYTES_PER_ELEMENT,
        )


def _nested_parameters(layer: nn.Module, half: Half) -> list[nn.Parameter]:
    """Returns the parameters that grow with the half's axis. The bias of an input-side layer does not grow."""
    parts = [(part, layer.get_submodule(half.path).get_submodule(part.path)) for part in half.parts]
    return [p for part, module in parts for p in module.parameters() if part.side != "input" or p is module.weight]


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(math.prod(p.shape) for p in parameters)


def _matrix_numel(parameters: Iterable[nn.Parameter]) -> int:
    """Returns the number of elements of matrices. Biases and norms cost no matrix product."""
    return _numel(p for p in parameters if p.dim() == 2)
