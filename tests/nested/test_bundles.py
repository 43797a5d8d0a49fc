"""Bundles by themselves: where their blocks lie, and which gradient a weight gets that no loss depends on."""

import copy

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from sorted_ds.families import nest
from sorted_ds.nested.blocks import are_adjacent
from sorted_ds.nested.bundles import Bundle, BundledHalf, bundle, contents_of
from sorted_ds.nested.weights import named_values
from tests.families import SPACE, VARIANTS, tiny_model


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_values_are_those_without_bundles(variant):
    model = nest(tiny_model(variant), SPACE)
    before = {name: value.clone() for name, value in named_values(model)}
    bundle(model)
    bundle(model)  # once is enough
    after = dict(named_values(model))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    num_halves = sum(isinstance(module, BundledHalf) for module in model.modules())
    assert num_halves == 2 * 4
    assert sum(contents.bundle is not None for contents in contents_of(model).values()) == 4 * (
        len(SPACE.sizes("g")) + len(SPACE.sizes("f"))
    )


@pytest.fixture
def _fresh_memory_is_nan(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_fresh_memory_is_nan")
@pytest.mark.parametrize("name", ["d4-g4-f112", "d2-g1-f32"])
def test_a_weight_that_the_loss_does_not_depend_on_has_a_gradient_of_zeros(name):
    model = nest(tiny_model("llama"), SPACE)
    bundle(model)
    model.set_subnet(name)
    mlp = model.model.layers[0].mlp
    mlp.half_forward = lambda hidden: mlp.up_proj(hidden)
    x = torch.randn(2, 3, mlp.bundles[0].hidden)
    mlp(x).sum().backward()
    active = mlp.active_bundles()
    assert len(active) == mlp.width.num_steps
    for own in active:
        gate, up, down = (own.weight.grad[start:stop] for start, stop in own.row_ranges)
        torch.testing.assert_close(up, x.sum((0, 1)).expand_as(up))
        assert not gate.any()
        assert not down.any()
    assert all(own.weight.grad is None for own in list(mlp.bundles)[len(active) :])


def test_a_linear_layer_that_runs_twice_has_the_gradient_of_both_times():
    model = nest(tiny_model("llama"), SPACE)
    bundled = copy.deepcopy(model)
    bundle(bundled)
    x = torch.randn(2, 3, model.config.hidden_size)
    plain, mlp = model.model.layers[0].mlp.up_proj, bundled.model.layers[0].mlp
    (plain(x) + plain(2 * x)).sum().backward()
    mlp.half_forward = lambda hidden: mlp.up_proj(hidden) + mlp.up_proj(2 * hidden)
    mlp(x).sum().backward()
    grad = torch.cat([own.weight.grad[slice(*own.row_ranges[1])] for own in mlp.bundles])
    torch.testing.assert_close(grad, torch.cat([block.weight.grad for block in plain.blocks]))


def test_active_bundles_share_memory_in_whatever_order_they_are_gathered():
    model = nest(tiny_model("llama"), SPACE)
    bundle(model)
    half = model.model.layers[0].mlp
    values = [own.blocks() for own in half.bundles]
    like = torch.empty(0)
    for step in (2, 0, 1):  # as a prefetch may bring them
        memory = half.allocate(step, like)
        own = half.bundles[step]
        for start, block in zip(own.block_starts, values[step], strict=True):
            memory[start : start + block.numel()] = block.flatten()
    for number in range(3):
        weight = [own.block(number) for own in half.bundles]
        assert are_adjacent(weight)
        assert all(torch.equal(block, own[number]) for block, own in zip(weight, values, strict=True))
    model.set_subnet("d2-g3-f80")  # narrower: still there
    half.bundles[0].weight.data = torch.empty(0)
    first = half.allocate(0, like)
    assert first.data_ptr() == half.bundles[1].weight.data_ptr()


def test_blocks_lie_in_shared_memory_until_the_parameter_gets_other_memory():
    own = Bundle(torch.zeros(5, 2), [2, 3])
    memory = torch.arange(20.0)
    own.use_shared_memory(memory, (4, 12), memory_steps=2)
    assert torch.equal(own.block(0), torch.arange(4.0, 8.0).view(2, 2))
    assert torch.equal(own.block(1), torch.arange(12.0, 18.0).view(3, 2))
    kept = StorageWeakRef(memory.untyped_storage())
    del memory
    assert not kept.expired()
    own.weight.data = torch.arange(100.0, 110.0).view(5, 2)
    assert kept.expired()
    assert torch.equal(torch.cat(own.blocks()), own.weight)


def test_a_half_is_called_with_hidden_states_by_name_or_without():
    """DeepSpeed's hooks see what has no name: they must see the hidden states either way."""
    model = nest(tiny_model("llama"), SPACE)
    bundle(model)
    seen = []
    for half in (model.model.layers[0].self_attn, model.model.layers[0].mlp):
        assert isinstance(half, nn.Module)
        half.register_forward_pre_hook(lambda _module, args: seen.append(len(args)))
    model(input_ids=torch.zeros(1, 4, dtype=torch.int64))
    assert seen == [1, 1]
