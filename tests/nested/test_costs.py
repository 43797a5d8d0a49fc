"""Costs equal what counting on the extracted model gives."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sorted_ds.families import family_of, nest
from sorted_ds.nested import costs_of, extract, sorted_by_cost, union_parameters
from sorted_ds.nested.weights import subnet_slices
from tests.batches import LLAMA
from tests.families import SPACE, VARIANTS, tiny_config, tiny_model, tokens

ROW_TOKENS = 16


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_equal_those_of_the_extracted_model(variant):
    model = nest(tiny_model(variant), SPACE)
    costs = costs_of(SPACE, family_of(model.config.model_type), tiny_config(variant), ROW_TOKENS)
    assert list(costs) == list(SPACE)
    for subnet, cost in costs.items():
        small = extract(model, subnet)
        assert cost.parameters == sum(p.numel() for p in small.parameters()), subnet
        shared = {id(p) for m in (small.lm_head, small.model.embed_tokens) for p in m.parameters()}
        others = sum(p.numel() for p in small.parameters() if id(p) not in shared)
        assert cost.non_embedding_parameters == others, subnet


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_equal_the_counted_ones_of_a_row(variant):
    model = nest(tiny_model(variant), SPACE)
    costs = costs_of(SPACE, family_of(model.config.model_type), tiny_config(variant), ROW_TOKENS)
    for subnet in SPACE:
        small = extract(model, subnet).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            small(input_ids=tokens(rows=1, length=ROW_TOKENS), use_cache=False)
        assert costs[subnet].flops_per_token * ROW_TOKENS == counter.get_total_flops(), subnet


@pytest.mark.parametrize("variant", VARIANTS)
def test_cache_bytes_equal_those_of_the_real_cache(variant):
    model = nest(tiny_model(variant, sliding_window=None) if "sliding" in variant else tiny_model(variant), SPACE)
    costs = costs_of(SPACE, family_of(model.config.model_type), tiny_config(variant), ROW_TOKENS)
    for subnet in SPACE:
        small = extract(model, subnet).to(torch.bfloat16).eval()
        length = 4  # under every sliding window, so that all positions are kept
        cache = small(input_ids=tokens(rows=1, length=length), use_cache=True).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert held == costs[subnet].kv_bytes_per_token * length, subnet


def test_the_space_of_a_nested_model_ascends_in_parameters():
    config = tiny_config("llama")
    space = sorted_by_cost(SPACE, LLAMA, config)
    parameters = [costs_of(space, LLAMA, config, 1)[subnet].parameters for subnet in space]
    assert parameters == sorted(parameters)
    assert set(space) == set(SPACE)
    assert space[-1] == space.full
    assert list(nest(tiny_model("llama"), SPACE).space) == list(space)


def test_longer_rows_cost_attention_alone():
    config = tiny_config("llama")
    short, long = (costs_of(SPACE, LLAMA, config, n)[SPACE.full] for n in (16, 32))
    assert long.parameters == short.parameters
    assert (
        long.flops_per_token - short.flops_per_token == 4 * 4 * 16 * 8 * 12
    )  # layers, 2 x 2 FLOPs, tokens, heads, dim


def test_the_union_of_sub_networks_counts_each_parameter_once():
    model = nest(tiny_model("llama"), SPACE)
    for names in (["d4-g1-f32", "d2-g4-f112"], ["d4-g4-f112", "d2-g1-f80"], ["d2-g3-f32", "d2-g1-f112", "d4-g1-f80"]):
        sampled = [SPACE[name] for name in names]
        used = {name for subnet in sampled for name in subnet_slices(model, subnet)}
        expected = sum(parameter.numel() for name, parameter in model.named_parameters() if name in used)
        assert union_parameters([sampled], LLAMA, model.config) == [expected]
