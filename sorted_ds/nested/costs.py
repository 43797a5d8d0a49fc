"""What each sub-network costs, counted on the family's own modules.

In: a Hugging Face config and a space. Out: `Cost` of every sub-network, and the space in their order.
Counts come from one layer built on the meta device (no memory, a few ms), so a new family needs no formula.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from sorted_ds.families.decoder import family_of, full_size, head_dim, queries_per_group, subnet_config
from sorted_ds.space import Cost, SubNet, SubNetSpace

KV_BYTES_PER_ELEMENT = 2


def costs_of(space: SubNetSpace, config: PreTrainedConfig, row_tokens: int) -> dict[SubNet, Cost]:
    """The cost of every sub-network, attention counted over `row_tokens` positions."""
    counted = _LayerCounts(config)
    return {subnet: counted.cost(subnet, row_tokens) for subnet in space}


def union_parameters(steps: Iterable[Sequence[SubNet]], config: PreTrainedConfig) -> list[int]:
    """For the samples of each step: parameters that any of them uses, each counted once."""
    counted = _LayerCounts(config)
    return [counted.union(samples) for samples in steps]


def sorted_by_cost(space: SubNetSpace, config: PreTrainedConfig) -> SubNetSpace:
    """The space in ascending order of parameters, ties by depth."""
    costs = costs_of(space, config, row_tokens=1)
    return space.sorted_by(lambda s: (costs[s].parameters, s))


class _LayerCounts:
    """Parameters of one layer by what they grow with, and of the rest."""

    def __init__(self, config: PreTrainedConfig):
        self.config = config
        full = full_size(config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(subnet_config(config, SubNet(1, full.groups, full.ffn)))
        layer = model.model.layers[0]
        attention, mlp = layer.self_attn, layer.mlp
        norms = [getattr(attention, name) for name in family_of(config.model_type).nested_head_norms]
        group_rows = [p for m in (attention.q_proj, attention.k_proj, attention.v_proj, *norms) for p in m.parameters()]
        ffn_rows = [p for m in (mlp.gate_proj, mlp.up_proj) for p in m.parameters()]
        self.group_parameters = _numel([*group_rows, attention.o_proj.weight]) // full.groups
        self.group_products = _matrix_numel([*group_rows, attention.o_proj.weight]) // full.groups
        self.ffn_parameters = _numel([*ffn_rows, mlp.down_proj.weight]) // full.ffn
        self.ffn_products = _matrix_numel([*ffn_rows, mlp.down_proj.weight]) // full.ffn
        nested = self.group_parameters * full.groups + self.ffn_parameters * full.ffn
        self.fixed_parameters = _numel(layer.parameters()) - nested
        self.final_norm_parameters = _numel(model.model.norm.parameters())
        self.shared_parameters = _numel(model.parameters()) - _numel(layer.parameters())
        self.head_products = model.get_output_embeddings().weight.numel()

    def layer_parameters(self, groups: int, ffn: int) -> int:
        return self.fixed_parameters + self.group_parameters * groups + self.ffn_parameters * ffn

    def union(self, samples: Sequence[SubNet]) -> int:
        total, lower = self.shared_parameters, 0
        for depth in sorted({subnet.depth for subnet in samples}):
            deep = [subnet for subnet in samples if subnet.depth >= depth]
            widest = (max(subnet.groups for subnet in deep), max(subnet.ffn for subnet in deep))
            total += (depth - lower) * self.layer_parameters(*widest)
            lower = depth
        return total

    def cost(self, subnet: SubNet, row_tokens: int) -> Cost:
        layers = subnet.depth * self.layer_parameters(subnet.groups, subnet.ffn)
        products = self.group_products * subnet.groups + self.ffn_products * subnet.ffn
        heads = subnet.groups * queries_per_group(self.config)
        attention = 4 * row_tokens * heads * head_dim(self.config)
        return Cost(
            parameters=self.shared_parameters + layers,
            non_embedding_parameters=self.final_norm_parameters + layers,
            flops_per_token=2 * (self.head_products + subnet.depth * products) + subnet.depth * attention,
            kv_bytes_per_token=2 * subnet.depth * subnet.groups * head_dim(self.config) * KV_BYTES_PER_ELEMENT,
        )


def _numel(parameters) -> int:
    return sum(math.prod(p.shape) for p in parameters)


def _matrix_numel(parameters: list[nn.Parameter]) -> int:
    """Elements of the matrices alone: biases and norms cost no matrix product."""
    return _numel(p for p in parameters if p.dim() == 2)
