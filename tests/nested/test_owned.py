"""Tensors that sub-networks own: each depth has a final norm of its own, in runs, extracts, files and loads."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sorted_ds.nested import NestedModel, extract, save_full
from sorted_ds.nested.load import build
from sorted_ds.nested.nest import nest_as
from sorted_ds.nested.owned import is_owner
from sorted_ds.nested.save import OWNED_FILE
from sorted_ds.nested.weights import named_values, subnet_slices
from sorted_ds.space import SubNet, SubNetSpace
from tests.batches import LLAMA
from tests.families import SPACE, SUBNETS, tiny_model, tokens
from tests.parity import logits_and_backward, logits_difference, run_nested, run_plain

OWNING = replace(LLAMA, owned={"model.norm": ("d",)})
"""Llama whose depths own the final norm, as a family that needs it would say in its table."""
ORDERED = SubNetSpace(SPACE, layer_order=(3, 1, 0, 2))


def owning(space: SubNetSpace = SPACE) -> NestedModel:
    """Each depth's norm has other values: 10 x its depth."""
    model = nest_as(OWNING, tiny_model("llama"), space)
    with torch.no_grad():
        for depth in space.sizes("d"):
            norm_of(model, depth).fill_(10.0 * depth)
    return model


def norm_of(model: NestedModel, depth: int) -> torch.Tensor:
    return model.get_parameter(f"model.norm.copies.d{depth}.weight")


def saved(model: NestedModel, folder: Path) -> Path:
    save_full(model, named_values(model), folder)
    return folder


def test_an_owner_is_a_part_of_the_names_of_those_that_use_it():
    subnet = SubNet(d=4, g=2, f=256)
    assert is_owner("d4", subnet)
    assert is_owner("d4-g2", subnet)
    assert is_owner("d4-g2-f256", subnet)
    assert not is_owner("d2", subnet)
    assert not is_owner("d4-g1", subnet)
    assert not is_owner("d40", subnet)


def test_a_copy_starts_with_the_values_of_the_original():
    plain = tiny_model("llama")
    model = nest_as(OWNING, copy.deepcopy(plain), SPACE)
    assert all(torch.equal(norm_of(model, depth), plain.model.norm.weight) for depth in (1, 2, 4))
    assert len({norm_of(model, depth).data_ptr() for depth in (1, 2, 4)}) == 3


@pytest.mark.parametrize("space", [SPACE, ORDERED], ids=["prefix", "layer order"])
def test_a_sub_network_runs_and_extracts_its_own_copy(space):
    model = owning(space)
    for name in SUBNETS:
        small = extract(model, name)
        assert (small.model.norm.weight == 10.0 * SPACE[name].depth).all()
        assert (
            small.state_dict().keys() == extract(nest_as(LLAMA, tiny_model("llama"), space), name).state_dict().keys()
        )
        outcome = run_nested(model, SPACE[name], tokens())
        # fp32, sums in another order: as in test_parity.py.
        assert logits_difference(outcome, run_plain(small, tokens())) <= 1e-5


def test_the_copies_of_others_get_no_gradient():
    model = owning()
    model.set_subnet("d2-g3-f112")
    logits_and_backward(model, tokens())
    assert {depth: norm_of(model, depth).grad is not None for depth in (1, 2, 4)} == {1: False, 2: True, 4: False}
    assert [name for name in subnet_slices(model, SPACE["d2-g3-f112"]) if "norm.copies" in name] == [
        "model.norm.copies.d2.weight"
    ]


def test_the_full_networks_copy_is_in_the_plain_checkpoint_and_the_others_are_beside_it(tmp_path):
    model = owning()
    saved(model, tmp_path / "model")
    beside = load_file(tmp_path / "model" / OWNED_FILE)
    assert {name: float(value[0]) for name, value in beside.items()} == {
        "model.norm.weight@d1": 10.0,
        "model.norm.weight@d2": 20.0,
    }
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    model.eval().set_subnet(SPACE.full)
    assert (plain.model.norm.weight == 40.0).all()
    torch.testing.assert_close(plain(tokens()).logits, model(tokens()).logits, rtol=1e-5, atol=1e-4)


def test_all_copies_are_read_back(tmp_path):
    model = owning()
    source = saved(model, tmp_path / "model")
    again = build(OWNING, tiny_model("llama").config, SPACE, source, seed=0, dtype=torch.float32)
    before, after = dict(named_values(model)), dict(named_values(again))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], value) for name, value in after.items())


def test_a_checkpoint_without_copies_gives_each_its_first_value(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    model = build(OWNING, tiny_model("llama").config, SPACE, tmp_path, seed=0, dtype=torch.float32)
    norm = tiny_model("llama").model.norm.weight
    assert all(torch.equal(norm_of(model, depth), norm) for depth in (1, 2, 4))


def test_a_model_whose_tensors_are_all_shared_has_no_file_beside_it(tmp_path):
    saved(nest_as(LLAMA, tiny_model("llama"), SPACE), tmp_path / "model")
    assert not (tmp_path / "model" / OWNED_FILE).exists()
