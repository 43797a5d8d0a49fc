"""What a sub-network touches: nothing is copied, joined views are used, nothing inactive gets a gradient."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from sorted_ds.base.errors import UserError
from sorted_ds.families import nest
from sorted_ds.nested import NestedModel, extract
from sorted_ds.nested.blocks import NestedModule, OutputNestedLinear, Width, are_adjacent
from sorted_ds.nested.bundles import contents_of
from sorted_ds.nested.layers import join_active
from sorted_ds.nested.layout import is_laid_out, lay_out
from sorted_ds.nested.weights import slices_of, subnet_slices
from sorted_ds.space import SubNet, SubNetSpace
from tests.families import SPACE, SUBNETS, VARIANTS, tiny_config, tiny_model, tokens
from tests.parity import WAYS, in_way, logits_and_backward, logits_difference, run_nested, run_plain


def tiny_nested(variant: str = "llama") -> NestedModel:
    return nest(tiny_model(variant), SPACE)


def nested_layers(model: nn.Module) -> list[NestedModule]:
    return [module for module in model.modules() if isinstance(module, NestedModule)]


class OperationsRun(TorchDispatchMode):
    """Names of the tensor operations that were run."""

    def __init__(self):
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_set_subnet_copies_nothing(variant):
    model = tiny_nested(variant)
    before = [(name, id(p), p.data_ptr(), p.shape) for name, p in model.named_parameters()]
    with OperationsRun() as watched:
        for name in SUBNETS:
            model.set_subnet(name)
    assert watched.operations == []
    assert before == [(name, id(p), p.data_ptr(), p.shape) for name, p in model.named_parameters()]


def test_set_subnet_cuts_the_configs_depth_and_lists_and_restores_them():
    model = tiny_nested("gemma2")
    whole = list(model.config.layer_types)
    model.set_subnet("d2-g1-f80")
    assert (model.config.num_hidden_layers, model.config.layer_types) == (2, whole[:2])
    model.set_subnet("d4-g4-f112")
    assert (model.config.num_hidden_layers, model.config.layer_types) == (4, whole)


def test_set_subnet_refuses_what_is_not_in_the_space_and_changes_nothing():
    model = tiny_nested()
    model.set_subnet("d2-g1-f80")
    with pytest.raises(UserError, match=r"d3-g1-f80 is not in the space\. Nearest that are: d4-g1-f80, d2-g1-f80"):
        model.set_subnet(SubNet(d=3, g=1, f=80))
    assert model.subnet.name == "d2-g1-f80"
    assert model.config.num_hidden_layers == 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_fresh_blocks_are_neighbours_and_used_as_one_matrix(variant):
    model = tiny_nested(variant)
    assert is_laid_out(model)
    layers = nested_layers(model)
    for layer, joined in zip(layers, join_active(layers), strict=True):
        assert set(joined) == set(layer.parameter_names)
        assert joined["weight"].data_ptr() == layer.blocks[0].weight.data_ptr()
        assert len(joined["weight"]) == layer.bounds[-1][1]


def named_nested(model: nn.Module) -> list[tuple[str, NestedModule]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, NestedModule)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_inactive_blocks_get_no_gradient_and_no_gradient_holds_more_than_the_active_bytes(variant, way):
    model = in_way(tiny_nested(variant), way)
    for name in SUBNETS:
        subnet = SPACE[name]
        run_nested(model, subnet, tokens())
        active, contents = subnet_slices(model, subnet), contents_of(model)
        assert slices_of(model).keys() == {name for own in contents.values() for name in own.names} >= active.keys()
        active_rows = {path: sum(layer.active_rows()) for path, layer in named_nested(model)}
        for key, parameter in model.named_parameters():
            if contents[key].names[0] not in active:
                assert parameter.grad is None, key
                continue
            assert parameter.grad.shape == parameter.shape
            path, _, block = key.partition(".blocks.")
            rows = active_rows[path] if block else len(parameter)
            limit = rows * parameter.numel() // len(parameter) * parameter.element_size()
            assert parameter.grad.untyped_storage().nbytes() <= limit, key


def test_the_joined_path_saves_weights_for_backward_as_views_of_the_blocks():
    model = tiny_nested()
    model.set_subnet("d4-g3-f80")
    shapes = {tuple(joined["weight"].shape) for joined in join_active(nested_layers(model))}
    shapes |= {shape[::-1] for shape in shapes}
    inside = [(p.data_ptr(), p.data_ptr() + p.nbytes) for p in model.parameters()]
    views, copies = [], []

    def pack(tensor: Tensor) -> Tensor:
        if tuple(tensor.shape) in shapes:
            is_view = any(start <= tensor.data_ptr() < stop for start, stop in inside)
            (views if is_view else copies).append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits_and_backward(model, tokens())
    assert len(views) == 7 * 4, "q, k, v, o, gate, up and down of four layers"
    assert copies == []


def test_a_layer_holds_joined_weights_only_while_it_runs():
    model = tiny_nested()
    seen = []

    def fail(*args) -> None:
        seen.extend(len(layer.joined) for layer in nested_layers(model.model.layers[1]))
        raise ZeroDivisionError

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=tokens())
    handle.remove()
    assert seen == [1] * 7
    model(input_ids=tokens())
    assert all(not layer.joined for layer in nested_layers(model))


def equal_to_extracted(model: NestedModel, tolerance: float) -> None:
    for name in SUBNETS:
        outcome = run_nested(model, SPACE[name], tokens())
        assert logits_difference(outcome, run_plain(extract(model, name), tokens())) <= tolerance, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_deep_copy_falls_back_to_blocks_and_stays_right_and_independent(variant):
    model = tiny_nested(variant)
    model.set_subnet("d2-g3-f112")
    twin = copy.deepcopy(model)
    assert not is_laid_out(twin)
    assert twin.widths["g"] is not model.widths["g"]
    equal_to_extracted(twin, 1e-5)
    assert twin.subnet.name == SUBNETS[-1]
    assert model.subnet.name == "d2-g3-f112"
    assert model.config.num_hidden_layers == model.widths["g"].num_steps == 2
    with torch.no_grad():
        twin.model.layers[0].mlp.gate_proj.blocks[0].weight.zero_()
    assert model.model.layers[0].mlp.gate_proj.blocks[0].weight.any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cast_model_stays_right(variant):
    model = tiny_nested(variant).to(torch.bfloat16)
    assert not is_laid_out(model)
    # bf16 keeps 8 bits: rounding of one product is 4e-3, and both sides round; in other orders of summation.
    equal_to_extracted(model, 4e-2)
    lay_out(model)
    assert is_laid_out(model)
    equal_to_extracted(model, 4e-2)


def test_lay_out_keeps_the_parameters_and_their_values():
    model = copy.deepcopy(tiny_nested("qwen2, biases, sliding"))
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    lay_out(model)
    assert is_laid_out(model)
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])
    equal_to_extracted(model, 1e-5)


def test_weights_updated_in_place_are_the_ones_that_run():
    model = tiny_nested("olmo2")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for name in SUBNETS:
        run_nested(model, SPACE[name], tokens())
        optimizer.step()
        assert is_laid_out(model)
        equal_to_extracted(model, 1e-5)


def test_blocks_with_a_gap_or_in_another_order_are_no_neighbours():
    rows = torch.arange(24.0).reshape(6, 4)
    assert are_adjacent([rows[:2], rows[2:6]])
    assert not are_adjacent([rows[:2], rows[3:6]])
    assert not are_adjacent([rows[2:4], rows[:2]])
    assert not are_adjacent([rows[:2], rows[2:].clone()])
    assert not are_adjacent([rows[:2, :3], rows[2:, :3]])


def test_a_reordered_buffer_is_not_joined():
    width = Width("f", [2, 4])
    layer = OutputNestedLinear(torch.randn(4, 3), None, width, 1)
    x = torch.randn(5, 3)
    before = layer(x)
    weights = [block.weight.detach().clone() for block in layer.blocks]
    swapped = torch.cat(weights[::-1])
    layer.blocks[0].weight.data, layer.blocks[1].weight.data = swapped[2:], swapped[:2]
    assert join_active([layer]) == [{}]
    torch.testing.assert_close(layer(x), before, rtol=1e-6, atol=1e-6)


def test_an_unknown_family_is_refused_and_told_how_to_add_it():
    with pytest.raises(
        UserError, match=r"'gpt2' is not known\. Known: llama, .*docs/add-a-family\.md says how to add one"
    ):
        nest(GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)), SPACE)


def test_a_nested_model_is_not_nested_again():
    with pytest.raises(UserError, match="nested already"):
        nest(tiny_nested(), SPACE)


def test_a_space_that_does_not_fit_the_model_is_refused_with_the_models_size():
    small = SubNetSpace.grid(depths=[1, 2], groups=[1, 4], ffn=[112])
    with pytest.raises(
        UserError, match=r"largest sub-network is d2-g4-f112, but the model is d4-g4-f112\. Make d4-g4-f112 the largest"
    ):
        nest(tiny_model("llama"), small)


def test_groups_that_the_familys_config_refuses_are_named_with_the_nearest_valid():
    sizes = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = tiny_model("llama", **sizes)
    with pytest.raises(UserError) as refused:
        nest(model, SubNetSpace.grid(depths=[4], groups=[3, 4], ffn=[112]))
    assert str(refused.value) == (
        "space.groups contains 3: that is 6 heads, and llama needs hidden_size 128 divisible by the number of heads. "
        "Nearest that work: 2, 4."
    )
    assert not isinstance(model, NestedModel)


def test_families_without_that_rule_take_any_number_of_groups():
    config = tiny_config("qwen3, head norms", hidden_size=128)
    assert 128 % 6
    model = nest(tiny_model("qwen3, head norms", hidden_size=128), SPACE)
    model.set_subnet("d2-g3-f80")
    small = extract(model, "d2-g3-f80")
    assert small.config.num_attention_heads == 6
    assert config.head_dim == small.config.head_dim
