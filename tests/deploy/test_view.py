"""Views: plain models on the full network's weights, bit-equal to extracted ones, in every family and precision."""

import copy
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import dispatch_model
from transformers import AutoModelForCausalLM

from sorted_ds import SubNetSpace, UserError, extract, nest, view
from sorted_ds.deploy.view import keep_owned, tail_view
from sorted_ds.nested.bundles import bundle
from sorted_ds.nested.weights import slice_of
from tests.families import SPACE, SUBNETS, VARIANTS, tiny_model, tokens
from tests.toys import ToyConfig, ToyForCausalLM, registered

ORDERED = SubNetSpace(SPACE, layer_order=[2, 0, 3, 1])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(tokens(rows=3)).logits


def in_precision(model, dtype: torch.dtype):
    """Casts the parameters alone, as from_pretrained does. `.to(dtype)` would round the rotary frequencies too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def storages(model) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_view_is_bit_equal_to_the_extracted_model_and_shares_its_memory(variant, dtype):
    model = in_precision(tiny_model(variant), dtype)
    nested = nest(copy.deepcopy(model), ORDERED)
    for name in SUBNETS:
        seen, own = view(model, name, space=ORDERED), extract(nested, name)
        assert torch.equal(logits(seen), logits(own)), name
        assert type(seen) is type(model)
        assert seen.config.to_dict() == own.config.to_dict()
        assert storages(seen) <= storages(model)
        assert seen.num_copied_bytes == 0
        assert not any(parameter.requires_grad for parameter in seen.parameters())


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tail_continues_from_the_hidden_states_of_a_layer(variant):
    """The hidden states are those that transformers returns for the whole sub-network, before the layer."""
    model = tiny_model(variant).eval()
    for name, first in (("d4-g4-f112", 2), ("d2-g3-f80", 1)):
        whole = view(model, name, space=ORDERED)(tokens(), output_hidden_states=True)
        tail = tail_view(model, name, first, space=ORDERED)
        assert torch.equal(tail(inputs_embeds=whole.hidden_states[first]).logits, whole.logits)
        assert storages(tail) <= storages(model)
        assert tail.num_copied_bytes == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_nested_model_can_be_viewed_while_it_runs_another_sub_network(variant):
    nested = nest(tiny_model(variant), ORDERED)
    nested.set_subnet("d1-g1-f32")
    for name in SUBNETS:
        seen = view(nested, name)
        # A nested model stores input-side weights transposed, and a product with such a matrix rounds in another order.
        assert (logits(seen) - logits(extract(nested, name))).abs().max() <= 1e-5
        assert storages(seen) <= storages(nested)
    assert nested.subnet.name == "d1-g1-f32"


def test_sizes_that_were_never_sampled_can_be_viewed():
    model = tiny_model("qwen3, head norms")
    between = SubNetSpace.grid(depths=[3, 4], groups=[2, 4], ffn=[50, 112], layer_order=ORDERED.layer_order)
    own = extract(nest(copy.deepcopy(model), between), "d3-g2-f50")
    assert torch.equal(logits(view(model, "d3-g2-f50", space=ORDERED)), logits(own))


def test_a_view_sees_a_change_of_the_full_network_and_its_copies_do_not():
    model = tiny_model("llama, tied")
    seen = view(model, "d2-g3-f80")
    copied, before = copy.deepcopy(seen), logits(seen)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert not torch.equal(logits(seen), before)
    assert torch.equal(logits(copied), before)
    assert seen.lm_head.weight is seen.model.embed_tokens.weight


def test_a_view_is_saved_as_an_ordinary_model(tmp_path):
    seen = view(tiny_model("gemma2"), "d2-g3-f80")
    seen.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(logits(read), logits(seen))


def test_a_view_generates_as_the_extracted_model_and_carries_the_generation_config():
    model = tiny_model("mistral, sliding")
    model.generation_config.max_new_tokens = 9
    seen = view(model, "d2-g1-f80", space=ORDERED)
    own = extract(nest(copy.deepcopy(model), ORDERED), "d2-g1-f80").eval()
    found = seen.generate(tokens(rows=2), do_sample=False)
    assert torch.equal(found, own.generate(tokens(rows=2), do_sample=False))
    assert found.shape[1] == 12 + 9


def test_views_are_made_without_memory():
    model = tiny_model("llama", hidden_size=768, intermediate_size=2048)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        seen = view(model, "d2-g3-f1024")
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert allocated < 0.001 * sum(parameter.nbytes for parameter in seen.parameters())


def test_threads_that_read_get_the_same_logits():
    model = tiny_model("llama")
    views = [view(model, name) for name in SUBNETS]
    expected, found = [logits(seen) for seen in views], {}

    def read(number: int) -> None:
        for _ in range(5):
            found[number] = logits(views[number % len(views)])
            time.sleep(0)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(value, expected[number % len(views)]) for number, value in found.items())


def test_threads_can_make_views_at_the_same_time():
    """transformers changes torch's default precision and its initialisation while it makes a model."""
    model, interval = in_precision(tiny_model("llama"), torch.bfloat16), sys.getswitchinterval()
    normal = torch.nn.init.normal_
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda number: view(model, SUBNETS[number % len(SUBNETS)]), range(40)))
    finally:
        sys.setswitchinterval(interval)
    assert torch.get_default_dtype() == torch.float32
    assert torch.nn.init.normal_ is normal


def test_a_dispatched_model_gives_views_with_hooks_of_their_own():
    """Accelerate moves the activations of a model on several devices. Here all of them are the CPU."""
    model = tiny_model("llama")
    expected = logits(view(model, "d2-g3-f80", space=ORDERED))
    paths = [
        "model.embed_tokens",
        *(f"model.layers.{n}" for n in range(4)),
        "model.norm",
        "model.rotary_emb",
        "lm_head",
    ]
    model = dispatch_model(model, dict.fromkeys(paths, "cpu"), force_hooks=True)
    model.hf_device_map["model.layers.3"] = "cpu:0"  # another name, so that there are two devices
    seen = view(model, "d2-g3-f80", space=ORDERED)
    assert sorted(path for path in seen.hf_device_map if "layers" in path) == ["model.layers.0", "model.layers.1"]
    assert torch.equal(logits(seen), expected)
    assert storages(seen) <= storages(model)


def test_a_model_of_a_directory_with_an_order_of_its_own_is_not_cut_without_its_space(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "sorted.json").write_text('{"layer_order": [2, 0, 3, 1]}')
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has another layer order\. Give its space"):
        view(model, "d2-g3-f80")
    with pytest.raises(UserError, match=r"has another layer order\. Give its space"):
        view(model, "d2-g3-f80", space=SPACE)
    assert view(model, "d2-g3-f80", space=ORDERED).config.num_hidden_layers == 2
    (tmp_path / "sorted.json").write_text("nope")
    with pytest.raises(UserError, match=r"is not a valid sorted\.json"):
        view(model, "d2-g3-f80", space=ORDERED)


@pytest.mark.parametrize(
    ("name", "space", "message"),
    [
        ("d5-g1-f32", None, "d5-g1-f32 is not a part of d4-g4-f112"),
        ("d2-f32", None, "d2-f32 is not a part of d4-g4-f112"),
        ("d2:3", None, "d2:3"),
        ("d1-g1-f32", SubNetSpace.of(["d1-g1-f32", "d8-g4-f112"]), "the space's largest sub-network is d8-g4-f112"),
    ],
)
def test_what_does_not_fit_is_one_line(name, space, message):
    with pytest.raises(UserError, match=message):
        view(tiny_model("llama"), name, space=space)


def test_a_model_of_another_kind_is_one_line():
    model = tiny_model("llama")
    with pytest.raises(
        UserError, match=r"a LlamaModel has no model\.layers .* Load the model with AutoModelForCausalLM"
    ):
        view(model.model, "d1-g1-f32")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(UserError, match="the model is quantised"):
        view(model, "d1-g1-f32")


def test_weights_that_are_not_in_memory_are_refused():
    offloaded = tiny_model("llama")
    offloaded.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(UserError, match=r"up_proj\.weight is not in memory: it is offloaded"):
        view(offloaded, "d1-g1-f32")
    nested = nest(tiny_model("llama"), SPACE)
    bundle(nested)
    with pytest.raises(UserError, match="in ZeRO-3's shards"):
        view(nested, "d1-g1-f32")


def test_a_view_has_the_tensors_that_its_sub_network_owns():
    """The toy family has other paths and axes, a buffer, and a norm for each depth."""
    with registered():
        config, space = ToyConfig(), SubNetSpace.grid(depths=[1, 3], widths=[16, 48])
        torch.manual_seed(3)
        plain = ToyForCausalLM(config).eval()
        nested = nest(copy.deepcopy(plain), space)
        with torch.no_grad():
            for parameter in nested.parameters():
                parameter.normal_(0.5, 0.2)
        full, ids = extract(nested, space.full).eval(), torch.arange(12).view(2, 6)
        own = {slice_of(name).key: value.detach() for name, value in nested.named_parameters() if ".copies." in name}
        keep_owned(full, own)
        for subnet in space:
            expected = extract(nested, subnet).eval()(ids).logits
            assert torch.equal(view(full, subnet)(ids).logits, expected)
            assert (view(nested, subnet)(ids).logits - expected).abs().max() < 1e-5
        bare = extract(nested, space.full)
        with pytest.raises(UserError, match=r"owns it\. Load the family with sorted_ds.load"):
            view(bare, space.smallest)
