"""A run begins with the weights of another run, in another space."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sorted_ds.run.checks import check_run
from sorted_ds.run.run_file import load_run
from tests.launched import run_dir, train
from tests.runs import run_file

ORDER = [2, 0, 1]


def second_run(folder: Path, first: Path, order: str) -> Path:
    """A run file of a run that begins with the model of the first one, with depths and widths of its own."""
    path = run_file(folder)
    text = path.read_text()
    model = text[text.index("init =") : text.index("[space]")]
    sizes = text[text.index("depths =") : text.index("[sampling]")]
    text = text.replace(model, f'init = "{run_dir(first)}"\n').replace("vocab_size = 300\n", "")
    text = text.replace(sizes, f"depths = [2, 3]\ngroups = [2]\nffn = [48, 64]\n{order}\n")
    path.write_text(text)
    return path


@pytest.fixture(scope="module", params=[None, ORDER], ids=["prefix", "ordered"])
def first(request, tmp_path_factory) -> Path:
    path = run_file(tmp_path_factory.mktemp("first"))
    if request.param:
        path.write_text(path.read_text().replace("ffn = [32, 64]", f"ffn = [32, 64]\nlayer_order = {request.param}"))
    train(path, "train.steps=2")
    return path


def test_weights_tokenizer_and_layer_order_are_those_of_the_other_run(first, tmp_path):
    """After one step at a rate of almost zero the weights are still those of the first run."""
    path = second_run(tmp_path, first, 'layer_order = "model"')
    run, model = load_run(path), run_dir(first) / "model"
    _, space = check_run(run)
    order = json.loads((model / "sorted.json").read_text())["layer_order"]
    assert space.layer_order == (None if order is None else tuple(order))
    assert {subnet.name for subnet in space} == {"d2-g2-f48", "d2-g2-f64", "d3-g2-f48", "d3-g2-f64"}
    assert run.data.tokenizer == str(model)
    train(path, "train.steps=1", "optim.learning_rate=1e-30", "optim.weight_decay=0", "optim.warmup_steps=0")
    before, after = (load_file(folder / "model.safetensors") for folder in (model, run_dir(path) / "model"))
    assert all(torch.equal(before[name], after[name]) for name in before)
