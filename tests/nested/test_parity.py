"""A sub-network of the nested model is the plain model of its size: logits, gradients, generation, files."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sorted_ds.families import nest
from sorted_ds.nested import NestedModel, extract
from sorted_ds.space import SubNetSpace
from tests.families import SPACE, SUBNETS, VARIANTS, tiny_model, tokens
from tests.parity import WAYS, cases, four_outcomes, grads_difference, in_way, logits_difference, run_nested

# fp32 rounds to 6e-8; sums over up to 112 channels and 4 layers in another order were measured at up to 2e-6, and the
# gradient of a single tensor (k_proj's bias, in which larger terms cancel) at up to 5e-6.
TOLERANCE = 1e-5


ORDER = (3, 1, 0, 2)
"""Depth 1 holds layer 3, depth 2 layers 1 and 3: where layers are of different kinds, others than a prefix has."""
ORDERED = SubNetSpace(SPACE, layer_order=ORDER)


def tiny_nested(variant: str, attention: str = "eager", space: SubNetSpace = SPACE) -> NestedModel:
    return nest(tiny_model(variant, attention), space)


@pytest.mark.parametrize(("variant", "attention"), cases())
def test_nested_and_extracted_equal_the_masked_full_model(variant, attention):
    for subnet, reference, outcomes in four_outcomes(variant, attention, SUBNETS):
        for way, outcome in outcomes.items():
            assert logits_difference(outcome, reference) <= TOLERANCE, (subnet, way)
            by_tensor, overall = grads_difference(outcome, reference)
            assert max(by_tensor, overall) <= TOLERANCE, (subnet, way)


def test_every_sub_network_of_the_space_equals_the_masked_full_model():
    names = [subnet.name for subnet in SPACE]
    for subnet, reference, outcomes in four_outcomes("qwen2, biases, sliding", "sdpa", names):
        assert max(logits_difference(o, reference) for o in outcomes.values()) <= TOLERANCE, subnet


def test_the_sub_networks_differ_from_each_other():
    """Else the comparisons above would say nothing."""
    model = tiny_nested("llama")
    outcomes = [run_nested(model, subnet, tokens()) for subnet in SPACE]
    apart = [logits_difference(a, b) for i, a in enumerate(outcomes) for b in outcomes[:i]]
    assert min(apart) > 0.01


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_changes_nothing(variant):
    model = tiny_nested(variant)
    for way in WAYS:
        checkpointed = in_way(model, way)
        checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        runs = []
        checkpointed.all_layers[0].mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        for name in SUBNETS[:3]:
            plain = run_nested(model, SPACE[name], tokens())
            outcome = run_nested(checkpointed, SPACE[name], tokens())
            assert logits_difference(outcome, plain) <= TOLERANCE
            assert grads_difference(outcome, plain)[0] <= TOLERANCE
        assert len(runs) == 2 * 3, "each forward pass runs again in backward"


def generated(model: PreTrainedModel, use_cache: bool):
    """Greedy continuation and the logits of its steps."""
    return model.eval().generate(
        tokens(length=7),
        attention_mask=torch.ones(2, 7, dtype=torch.long),
        max_new_tokens=8,
        do_sample=False,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_with_a_cache_equals_the_extracted_models_and_that_without(variant):
    model = tiny_nested(variant)
    for name in SUBNETS[:4]:
        model.set_subnet(name)
        nested = generated(model, use_cache=True)
        assert len(nested.past_key_values.layers) == SPACE[name].depth
        assert nested.past_key_values.layers[0].keys.shape[1] == SPACE[name]["g"]
        for other in (generated(extract(model, name), use_cache=True), generated(model, use_cache=False)):
            assert torch.equal(nested.sequences, other.sequences)
            torch.testing.assert_close(nested.logits, other.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_pretrained_writes_the_full_plain_model_whatever_runs(variant, tmp_path):
    plain = tiny_model(variant)
    model = nest(copy.deepcopy(plain), SPACE)
    model.set_subnet("d2-g1-f80")
    model.save_pretrained(tmp_path)
    assert model.subnet == SPACE["d2-g1-f80"]
    assert model.config.num_hidden_layers == 2

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(loaded) is type(plain)
    assert loaded.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())
    assert torch.equal(loaded(tokens()).logits, plain.eval()(tokens()).logits)
    # What Hugging Face adds when it saves, and `head_dim`, which we always write out.
    added = {"architectures", "_name_or_path", "transformers_version", "head_dim"}
    ours, theirs = loaded.config.to_dict(), plain.config.to_dict()
    assert [key for key in ours.keys() - added if ours[key] != theirs[key]] == []
    assert loaded.config.head_dim == plain.model.layers[0].self_attn.head_dim


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_extracted_model_saved_and_loaded_gives_equal_logits(variant, tmp_path):
    model = tiny_nested(variant)
    for name in SUBNETS[:3]:
        small = extract(model, name)
        small.save_pretrained(tmp_path / name)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name, attn_implementation="eager")
        assert torch.equal(loaded(tokens()).logits, small.eval()(tokens()).logits)
        assert (loaded.config.num_hidden_layers, loaded.config.num_key_value_heads) == (
            SPACE[name].depth,
            SPACE[name]["g"],
        )
        assert loaded.config.intermediate_size == SPACE[name]["f"]


def test_an_extracted_model_has_its_own_weights():
    model = tiny_nested("llama")
    small = extract(model, SPACE.full)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    small.generation_config.max_new_tokens = 3
    assert all(parameter.any() for parameter in model.parameters())
    assert model.generation_config.max_new_tokens != 3


@pytest.mark.parametrize(("variant", "attention"), cases())
def test_with_a_layer_order_nested_and_extracted_equal_the_masked_model_that_runs_the_chosen_layers(variant, attention):
    for subnet, reference, outcomes in four_outcomes(variant, attention, SUBNETS, order=ORDER):
        for way, outcome in outcomes.items():
            assert logits_difference(outcome, reference) <= TOLERANCE, (subnet, way)
            by_tensor, overall = grads_difference(outcome, reference)
            assert max(by_tensor, overall) <= TOLERANCE, (subnet, way)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_order_changes_every_depth_but_the_full_one(variant):
    """Else the comparisons above would say nothing."""
    prefix, ordered = tiny_nested(variant), tiny_nested(variant, space=ORDERED)
    for name in SUBNETS:
        apart = logits_difference(*(run_nested(model, SPACE[name], tokens()) for model in (ordered, prefix)))
        assert (apart == 0) == (SPACE[name].depth == 4), name
        assert apart == 0 or apart > 0.01, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kinds_of_layers_follow_the_chosen_layers(variant):
    model = tiny_nested(variant, space=ORDERED)
    whole = list(getattr(model.config, "layer_types", None) or ())
    for name in SUBNETS:
        chosen = sorted(ORDER[: SPACE[name].depth])
        expected = [whole[number] for number in chosen] if whole else None
        model.set_subnet(name)
        small = extract(model, name)
        assert [model.all_layers.index(layer) for layer in model.model.layers] == chosen
        for config in (model.config, small.config):
            assert config.num_hidden_layers == len(chosen)
            assert getattr(config, "layer_types", None) == expected
        assert not whole or [layer.self_attn.layer_type for layer in small.model.layers] == expected


def test_the_tiny_models_with_two_kinds_of_layers_show_a_wrong_kind():
    """The order takes kinds that no prefix of the same depth has."""
    for variant in ("qwen2, biases, sliding", "gemma2"):
        whole = tiny_model(variant).config.layer_types
        assert [whole[number] for number in sorted(ORDER[:2])] != whole[:2]
        assert whole[ORDER[0]] != whole[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_a_layer_order_generation_with_a_cache_equals_the_extracted_models_and_that_without(variant):
    model = tiny_nested(variant, space=ORDERED)
    for name in SUBNETS[:4]:
        model.set_subnet(name)
        nested = generated(model, use_cache=True)
        assert len(nested.past_key_values.layers) == SPACE[name].depth
        for other in (generated(extract(model, name), use_cache=True), generated(model, use_cache=False)):
            assert torch.equal(nested.sequences, other.sequences)
            torch.testing.assert_close(nested.logits, other.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_a_layer_order_an_extracted_model_holds_the_chosen_layers_renumbered(variant, tmp_path):
    plain = tiny_model(variant)
    model = nest(copy.deepcopy(plain), ORDERED)
    for name in SUBNETS[:3]:
        small = extract(model, name)
        chosen = sorted(ORDER[: SPACE[name].depth])
        for place, number in enumerate(chosen):
            norm = plain.model.layers[number].post_attention_layernorm.weight
            assert torch.equal(small.model.layers[place].post_attention_layernorm.weight, norm)
            assert small.model.layers[place].self_attn.layer_idx == place
        small.save_pretrained(tmp_path / name)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name, attn_implementation="eager")
        model.eval().set_subnet(name)
        assert torch.equal(loaded(tokens()).logits, small.eval()(tokens()).logits)
        torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_order_leaves_the_full_network_as_it_is(variant, tmp_path):
    plain = tiny_model(variant)
    model = nest(copy.deepcopy(plain), ORDERED)
    model.set_subnet("d2-g1-f80")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())
    assert torch.equal(loaded(tokens()).logits, plain.eval()(tokens()).logits)
    model.eval().set_subnet("d4-g4-f112")
    torch.testing.assert_close(model(tokens()).logits, plain(tokens()).logits, rtol=1e-5, atol=1e-5)
