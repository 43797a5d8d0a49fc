"""A nested model built on the meta device is the one that Hugging Face would have made or loaded."""

import copy
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from sorted_ds.base.errors import UserError
from sorted_ds.families import family_of, nest
from sorted_ds.nested import Family, extract
from sorted_ds.nested.hf_weights import resolve_source
from sorted_ds.nested.layout import is_laid_out
from sorted_ds.nested.load import build
from sorted_ds.space import SubNetSpace
from tests.batches import LLAMA
from tests.families import SPACE, SUBNETS, VARIANTS, tiny_config, tiny_model, tokens

FULL_ONLY = SubNetSpace.of(["d4-g4-f112"])
SHARD_SIZES = {"one file": "1GB", "shards": "100KB"}


def family(variant: str) -> Family:
    return family_of(tiny_config(variant).model_type)


def saved(tmp_path, variant="llama", shards="one file"):
    tiny_model(variant).save_pretrained(tmp_path, max_shard_size=SHARD_SIZES[shards])
    assert (tmp_path / "model.safetensors").exists() == (shards == "one file")
    return tmp_path


def loaded(source, dtype=torch.float32, space=SPACE):
    config = AutoConfig.from_pretrained(source)
    return build(family_of(config.model_type), config, space, source, seed=0, dtype=dtype)


@pytest.mark.parametrize("shards", SHARD_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_loads_as_from_pretrained_does(variant, dtype, shards, tmp_path):
    source = saved(tmp_path, variant, shards)
    ours = loaded(source, dtype).eval()
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    assert is_laid_out(ours)
    assert ours.dtype == theirs.dtype
    # The same weights, but input-side ones are stored transposed: the product may sum in another order.
    tolerance = 1e-6 if dtype is torch.float32 else 2e-2
    theirs_logits = theirs(tokens()).logits
    difference = (ours(tokens()).logits - theirs_logits).abs().max()
    assert difference <= tolerance * theirs_logits.abs().max()
    whole = extract(ours, SPACE.full).state_dict()
    assert whole.keys() == theirs.state_dict().keys()
    assert all(torch.equal(whole[name], tensor) for name, tensor in theirs.state_dict().items())
    for (name, buffer), (their_name, their_buffer) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert (name, buffer.dtype) == (their_name, their_buffer.dtype)
        assert torch.equal(buffer, their_buffer)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sub_networks_of_a_loaded_checkpoint_equal_those_of_the_nested_plain_model(variant, tmp_path):
    ours = loaded(saved(tmp_path, variant)).eval()
    plain = nest(AutoModelForCausalLM.from_pretrained(tmp_path), SPACE)
    for name in SUBNETS:
        ours.set_subnet(name)
        plain.set_subnet(name)
        assert torch.equal(ours(tokens()).logits, plain(tokens()).logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_scratch_weights_depend_on_the_seed_alone(variant):
    def weights(space, seed, dtype=torch.float32):
        return extract(
            build(family(variant), tiny_config(variant), space, None, seed, dtype), "d4-g4-f112"
        ).state_dict()

    ours = weights(SPACE, seed=3)
    torch.rand(7)
    assert all(torch.equal(ours[name], other) for name, other in weights(FULL_ONLY, seed=3).items())
    rounded = weights(SPACE, seed=3, dtype=torch.bfloat16)
    assert all(torch.equal(ours[name].bfloat16(), other) for name, other in rounded.items())
    name = "model.layers.1.mlp.gate_proj.weight"
    assert not torch.equal(ours[name], weights(SPACE, seed=4)[name])
    assert not torch.equal(ours[name], ours["model.layers.2.mlp.gate_proj.weight"])


def test_building_leaves_the_global_random_state_and_the_config_alone():
    config = tiny_config("llama")
    before = copy.deepcopy(config.to_dict())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    build(LLAMA, config, SPACE, None, 0, torch.float32).set_subnet(SPACE.smallest)
    assert torch.equal(torch.get_rng_state(), state)
    assert config.to_dict() == before


@pytest.mark.parametrize("variant", VARIANTS)
def test_scratch_weights_are_distributed_as_hugging_faces_own(variant):
    config = tiny_config(variant, initializer_range=0.05)
    ours = extract(build(family(variant), config, SPACE, None, 0, torch.float32), SPACE.full).state_dict()
    theirs = AutoModelForCausalLM.from_config(tiny_config(variant, initializer_range=0.05)).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if tensor.unique().numel() == 1:
            assert torch.equal(ours[name], tensor), name
        else:
            # 4,608 elements at least: the standard deviation's own error is 1 %, the mean's 0.05 / 68.
            assert ours[name].std().item() == pytest.approx(tensor.std().item(), rel=0.06), name
            assert abs(ours[name].mean().item()) < 0.05 / 68 * 5, name


def test_the_buffers_of_a_scratch_model_are_those_of_a_plain_one():
    for variant in VARIANTS:
        ours = build(family(variant), tiny_config(variant), SPACE, None, 0, torch.bfloat16)
        theirs = AutoModelForCausalLM.from_config(tiny_config(variant), dtype=torch.bfloat16)
        pairs = zip(ours.named_buffers(), theirs.named_buffers(), strict=True)
        for (name, buffer), (their_name, their_buffer) in pairs:
            assert (name, buffer.dtype) == (their_name, their_buffer.dtype)
            assert torch.equal(buffer, their_buffer), (variant, name)


def test_tied_weights_stay_one_parameter(tmp_path):
    for model in (
        build(LLAMA, tiny_config("llama, tied"), SPACE, None, 0, torch.float32),
        loaded(saved(tmp_path, "llama, tied")),
    ):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert not any(p.is_meta for p in model.parameters())


def test_the_generation_config_comes_along(tmp_path):
    source = saved(tmp_path)
    settings = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps({**settings, "temperature": 0.7, "do_sample": True}))
    model = loaded(source)
    assert model.generation_config.temperature == 0.7
    assert extract(model, SPACE.smallest).generation_config.temperature == 0.7


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest real tensor that was made."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not made.is_meta:
            self.nbytes = max(self.nbytes, made.nbytes)
        return made


def test_a_checkpoint_is_read_slice_by_slice(tmp_path):
    source = saved(tmp_path)
    config = AutoConfig.from_pretrained(source)
    with LargestTensor() as watched:
        build(LLAMA, config, SPACE, source, 0, torch.float32)
    assert watched.nbytes == 131 * 96 * 4, "the embedding, the largest single tensor"


def test_pickled_weights_are_refused(tmp_path):
    tiny_config("llama").save_pretrained(tmp_path)
    torch.save(tiny_model("llama").state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds neither model\.safetensors nor .*Pickled weights \(\.bin\)"):
        loaded(tmp_path)


def test_a_missing_tensor_is_named(tmp_path):
    source = saved(tmp_path, "llama")
    config = AutoConfig.from_pretrained(source)
    config.attention_bias = True
    with pytest.raises(UserError, match=r"holds no tensor 'model\.layers\.0\.self_attn\.q_proj\.bias'"):
        build(LLAMA, config, SPACE, source, 0, torch.float32)


def test_a_tensor_of_another_shape_is_named_with_both(tmp_path):
    source = saved(tmp_path)
    config = AutoConfig.from_pretrained(source)
    config.vocab_size = 140
    with pytest.raises(UserError, match=r"embed_tokens\.weight has shape \(131, 96\), but the config says \(140, 96\)"):
        build(LLAMA, config, SPACE, source, 0, torch.float32)


def test_a_missing_shard_is_named(tmp_path):
    source = saved(tmp_path, shards="shards")
    shard = sorted(source.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        loaded(source)


def test_a_truncated_file_is_named(tmp_path):
    source = saved(tmp_path)
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read as safetensors .*Get the file again"):
        loaded(source)


def test_a_damaged_index_is_named(tmp_path):
    source = saved(tmp_path, shards="shards")
    for text in ("{", "{}", "[]"):
        (source / "model.safetensors.index.json").write_text(text)
        with pytest.raises(UserError, match=r"index\.json is not an index of safetensors"):
            loaded(source)


def test_a_directory_is_its_own_source_and_needs_a_config(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        resolve_source(str(tmp_path))
    saved(tmp_path)
    assert resolve_source(str(tmp_path)) == tmp_path


def test_a_hub_id_is_asked_for_once(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--small" / "snapshots" / "0123abc"
    saved(snapshot)
    refs = tmp_path / "models--someone--small" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert resolve_source("someone/small") == snapshot
    refs.rename(tmp_path / "gone")  # whoever asks again finds nothing
    assert resolve_source("someone/small") == snapshot


@pytest.mark.parametrize("init", ["no/such/directory", "bad//name!!", "./runs/gone", "nobody/none-at-all"])
def test_what_is_neither_directory_nor_hub_id_is_one_line_for_the_user(init, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"is not a directory and cannot be downloaded from the Hugging Face hub"
    ) as refused:
        resolve_source(init)
    assert "\n" not in str(refused.value)
