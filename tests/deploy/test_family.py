"""A trained family from disk: loaded when it is used, one set of weights, and sub-networks that are read alone."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch

import sorted_ds
from sorted_ds import UserError, extract, load
from sorted_ds.nested.hf_weights import CheckpointReader
from tests.families import SUBNETS, VARIANTS, tokens
from tests.trained import load_nested, measured_run, trained_run

ORDER = (2, 0, 3, 1)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(tokens(rows=3)).logits


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return measured_run(tmp_path_factory.mktemp("family"), layer_order=ORDER)


@pytest.mark.parametrize("variant", VARIANTS)
def test_viewed_and_read_sub_networks_are_the_extracted_ones(variant, tmp_path):
    family = load(trained_run(tmp_path, variant, layer_order=ORDER))
    nested = load_nested(tmp_path)
    for name in SUBNETS:
        expected = logits(extract(nested, name))
        assert torch.equal(logits(family[name]), expected)
        assert torch.equal(logits(family.read(name)), expected)
    assert family[SUBNETS[0]] is family[SUBNETS[0]]
    assert logits(family.full).shape == expected.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_keep_their_stored_precision(tmp_path, dtype):
    family = load(trained_run(tmp_path, dtype=dtype))
    assert {parameter.dtype for parameter in family["d2-g3-f80"].parameters()} == {dtype}
    assert family["d2-g3-f80"].config.dtype == dtype
    assert {parameter.dtype for parameter in load(tmp_path, dtype=torch.float32).full.parameters()} == {torch.float32}


def test_a_sub_network_that_is_read_alone_reads_no_byte_more(run):
    family, read = load(run), []
    finite = CheckpointReader._finite

    def counting(reader, name, value):
        read.append(value.nbytes)
        return finite(reader, name, value)

    with mock.patch.object(CheckpointReader, "_finite", counting):
        small = family.read("d1-g1-f32")
    assert sum(read) == sum(parameter.nbytes for parameter in small.parameters())
    assert family._full is None, "the full network is not loaded"


def test_threads_get_one_full_network_and_one_view(run):
    family = load(run)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: (family.full, family[SUBNETS[0]]), range(16)))
    assert {id(full) for full, _ in found} == {id(family.full)}
    assert {id(view) for _, view in found} == {id(family[SUBNETS[0]])}


def test_nothing_is_loaded_before_it_is_used(run, tmp_path):
    family = load(trained_run(tmp_path))
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert len(family) == len(list(family)) == 27
    assert "d1-g1-f32" in family
    assert "d1-g2-f32" not in family
    assert "nonsense" not in family
    with pytest.raises(UserError, match=r"cannot be read as safetensors"):
        _ = family.full


def test_the_model_directory_and_a_hub_id_are_the_same_family(run, tmp_path, monkeypatch):
    expected = logits(load(run)["d2-g3-f80"])
    assert torch.equal(logits(load(run / "model")["d2-g3-f80"]), expected)
    downloaded = tmp_path / "models--somebody--family"  # as the hub's library keeps it
    shutil.copytree(run / "model", downloaded / "snapshots" / "0123abc")
    (downloaded / "refs").mkdir()
    (downloaded / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert torch.equal(logits(load("somebody/family")["d2-g3-f80"]), expected)


def test_the_best_within_a_budget_is_a_view(run):
    family = load(run)
    rows = {row.subnet: row.parameters for row in family.table}
    budget = sorted(rows.values())[5]
    found = family.best(max_params=budget)
    assert sum(parameter.numel() for parameter in found.parameters()) == budget
    assert family.best(max_params="10M") is family[family.space.full]
    with pytest.raises(UserError, match="none of 27 sub-networks is within the budget"):
        family.best(max_params=10)
    with pytest.raises(UserError, match="Give --max-params"):
        family.best()


def test_it_generates_with_its_tokenizer(run):
    family = load(run)
    ids = family.tokenizer("def", return_tensors="pt")["input_ids"]
    found = family["d2-g3-f80"].generate(ids, max_new_tokens=5, do_sample=False)
    assert found.shape == (1, 8)
    assert str(len(family)) in repr(family)


def test_what_is_no_family_is_one_line(run, tmp_path):
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "empty", "has no sorted.json"),
        (tmp_path / "nowhere", "is not a directory and cannot be downloaded"),
    ):
        with pytest.raises(UserError, match=message):
            load(source)
    with pytest.raises(UserError, match=r"d2-g2-f80 cannot be cut from this family\. Nearest that can: d2-g3-f80, "):
        load(run)["d2-g2-f80"]
    with pytest.raises(UserError, match="has no measured sub-networks"):
        _ = load(trained_run(tmp_path / "unmeasured")).table


def test_the_names_are_public():
    assert sorted_ds.load is load
    assert sorted_ds.TrainedFamily.__module__ == "sorted_ds.deploy.family"
