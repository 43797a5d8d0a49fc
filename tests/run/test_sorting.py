"""Sorting: the full network computes the same, sub-networks start better, and a run takes the order of a directory."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sorted_ds.base.errors import UserError
from sorted_ds.commands.cli import main
from sorted_ds.deploy.license import base_of
from sorted_ds.families import family_of, nest
from sorted_ds.nested.importance import layer_order, sort_units, watched
from sorted_ds.run.checks import check_run
from sorted_ds.run.model_config import require_sorted
from sorted_ds.run.run_file import load_run
from sorted_ds.run.sorting import Measured
from sorted_ds.tasks import SummedLoss, task_of
from tests.families import SPACE, VARIANTS, tiny_model, tokens
from tests.launched import one_error, run_dir, train
from tests.runs import run_file
from tests.trained import tokenizer


@torch.no_grad()
def measured(model, variant: str):
    with watched(model, family_of(model.config.model_type)) as importance:
        model(tokens(rows=4))
        model(tokens(rows=2, seed=1))
    return importance


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sorted_model_computes_the_same_in_every_family(variant):
    model = tiny_model(variant).eval()
    before = model(tokens(rows=3)).logits
    weights = copy.deepcopy(model.state_dict())
    sort_units(model, family_of(model.config.model_type), measured(model, variant))
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])]
    assert any("o_proj" in name for name in changed)
    assert any("down_proj" in name for name in changed)
    assert not any("embed" in name or "layernorm" in name for name in changed)
    after = model(tokens(rows=3)).logits
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.parametrize("variant", ["llama, biases", "gemma2", "olmo2"])
def test_importance_is_the_mean_square_of_what_a_unit_adds(variant):
    """Measured another way: each group's part of o_proj's output, from its input with all other groups set to zero."""
    model = tiny_model(variant).eval()
    importance = measured(model, variant)
    layer, groups = model.model.layers[1].self_attn.o_proj, model.config.num_key_value_heads
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(tokens(rows=4))
        model(tokens(rows=2, seed=1))
    handle.remove()
    inputs = torch.cat([each.flatten(0, 1) for each in seen])
    rows = inputs.shape[1] // groups
    for group in range(groups):
        alone = torch.zeros_like(inputs)
        alone[:, group * rows : (group + 1) * rows] = inputs[:, group * rows : (group + 1) * rows]
        expected = (alone @ layer.weight.T).square().sum()
        assert importance[1, "g"][group].item() == pytest.approx(expected.item(), rel=1e-4)


def test_sorted_units_descend_in_importance():
    model = tiny_model("llama").eval()
    family = family_of("llama")
    sort_units(model, family, measured(model, "llama"))
    again = measured(model, "llama")
    assert all((values.diff() <= 1e-6 * values[0]).all() for values in again.values())


def test_what_is_cut_off_a_sorted_model_adds_least():
    """With one large channel at the end, a cut network is nearer to the full one after sorting."""
    model = tiny_model("llama").eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, -20:] *= 20
    full = model(tokens(rows=4)).logits

    def distance(plain) -> float:
        nested = nest(copy.deepcopy(plain), SPACE).eval()
        nested.set_subnet("d4-g4-f80")
        return (nested(tokens(rows=4)).logits - full).square().mean().item()

    before = distance(model)
    sort_units(model, family_of("llama"), measured(model, "llama"))
    assert distance(model) < 0.1 * before


def test_the_layer_order_leaves_out_one_layer_after_the_other():
    costs = {0: 50.0, 1: 3.0, 2: 1.0, 3: 2.0, 4: 10.0, 5: 40.0}
    asked = []

    def losses_without(layers: tuple[int, ...]):
        asked.append(layers)
        for layer in costs.keys() - layers:
            extra = 100.0 if {1, 3} <= {*layers, layer} else 0.0  # 1 and 3 must not both be left out
            yield layer, 1.0 + sum(costs[each] for each in (*layers, layer)) + extra

    progress = []
    order, losses = layer_order(6, 3, losses_without, lambda done, total: progress.append((done, total)))
    assert order == (0, 1, 5, 4, 3, 2)
    assert losses == {5: 2.0, 4: 4.0, 3: 14.0}
    assert asked == [(), (2,), (2, 3)]
    assert progress[-1] == (15, 15)
    assert [done for done, _ in progress] == list(range(1, 16))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_without_a_layer_is_that_of_a_model_that_lacks_it(variant):
    """The passes begin behind the layer that is left out. Here Hugging Face's model runs from its first layer on."""
    model, family = tiny_model(variant).eval(), family_of(tiny_model(variant).config.model_type)
    batches = [{"input_ids": tokens(rows=2, seed=seed), "labels": tokens(rows=2, seed=seed + 9)} for seed in (0, 1)]
    nested = nest(copy.deepcopy(model), SPACE)
    measured = Measured(SummedLoss(nested, task_of("causal_lm"), family).eval(), family, batches)
    found = dict(measured.losses_without((1,)))
    assert sorted(found) == [0, 2, 3]
    for number, loss in found.items():
        lacking = copy.deepcopy(model)
        layers = lacking.get_submodule(family.layers)
        for left_out in sorted({1, number}, reverse=True):
            del layers[left_out]
        lacking.config.num_hidden_layers = 2
        if getattr(lacking.config, "layer_types", None):
            kept = [kind for at, kind in enumerate(model.config.layer_types) if at not in (1, number)]
            lacking.config.layer_types = kept
        with torch.no_grad():
            logits = [lacking(batch["input_ids"], use_cache=False).logits.flatten(0, 1) for batch in batches]
        labels = torch.cat([batch["labels"].flatten() for batch in batches])
        assert loss == pytest.approx(torch.nn.functional.cross_entropy(torch.cat(logits), labels).item(), rel=1e-5)


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Returns a folder with text, a model with channels of very different size, and the sorted model."""
    folder = tmp_path_factory.mktemp("sorting")
    run = run_file(folder)
    text = run.read_text()
    start, stop = text.index("[model]"), text.index("[sampling]")
    space = '[space]\nlayer_order = "model"\ndepths = [2, 4]\ngroups = [1, 4]\nffn = [32, 112]\n'
    run.write_text(f'{text[:start]}[model]\ninit = "sorted"\n{space}{text[stop:]}')
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, -30:] *= 10
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "model" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    assert main(command(folder)) == 0
    return folder


def command(folder: Path, out: str = "sorted", *more: str) -> list[str]:
    sizes = ["--row-tokens", "32", "--tokens", "512", "--order-tokens", "256"]
    return ["sort", str(folder / "model"), "--out", str(folder / out), "--text", str(folder / "text"), *sizes, *more]


def test_a_sorted_directory_is_an_ordinary_model_with_the_same_logits(folder):
    plain, after = (AutoModelForCausalLM.from_pretrained(folder / name).eval() for name in ("model", "sorted"))
    with torch.no_grad():
        before, found = plain(tokens(rows=3)).logits, after(tokens(rows=3)).logits
    assert (found - before).abs().max() <= 1e-5 * before.abs().max()
    assert base_of(folder / "sorted", None) == {"trained_from": "checkpoint", "license": "apache-2.0"}


def test_the_report_says_what_sub_networks_lose(folder, capsys):
    capsys.readouterr()
    assert main(command(folder, "again", "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    by_name = {name: number for number, name in enumerate(report["subnets"])}
    full, narrow, shallow = by_name["d4-g4-f112"], by_name["d4-g4-f56"], by_name["d2-g4-f112"]
    assert report["before"][full] == pytest.approx(report["after"][full], rel=1e-5)
    assert report["after"][narrow] - report["after"][full] < report["before"][narrow] - report["before"][full]
    assert report["ordered"][full] == pytest.approx(report["after"][full], rel=1e-5)
    assert report["ordered"][shallow] != report["after"][shallow] or report["layer_order"] == [0, 1, 2, 3]
    assert sorted(report["layer_order"]) == [0, 1, 2, 3]
    assert set(report["losses_by_depth"]) == {"2", "3", "4"}
    assert {axis: len(layers) for axis, layers in report["importance"].items()} == {"g": 4, "f": 4}
    assert json.loads((folder / "again" / "sorted.json").read_text())["layer_order"] == report["layer_order"]
    assert main(["select", str(folder / "again"), "--max-params", "1M"]) == 2
    assert "`sorted-ds sort` wrote it, and the model is not trained yet" in one_error(capsys.readouterr().err)


def test_people_see_two_tables(folder, capsys):
    capsys.readouterr()
    assert main(command(folder, "shown", "--fewest-layers", "3")) == 0
    said = capsys.readouterr().out
    assert "sorted, layer order" in said
    assert "left out" in said
    assert 'take the order with space.layer_order = "model"' in said


def test_a_run_takes_the_order_and_resumes_with_no_other(folder, capsys):
    run = folder / "tiny.toml"
    order = json.loads((folder / "sorted" / "sorted.json").read_text())["layer_order"]
    assert list(check_run(load_run(run))[1].layer_order) == order
    train(run, "train.steps=4", "checkpoint.every_steps=2", "eval.every_steps=0")
    written = json.loads((run_dir(run) / "model" / "sorted.json").read_text())
    assert written["layer_order"] == order
    shutil.rmtree(run_dir(run) / "model")
    facts = json.loads((folder / "sorted" / "sorted.json").read_text())
    (folder / "sorted" / "sorted.json").write_text(json.dumps({**facts, "layer_order": order[::-1]}))
    assert main(["plan", str(run)]) == 2
    assert "belongs to another run: space.layer_order" in one_error(capsys.readouterr().err)


def test_a_run_sorts_before_its_first_step(folder, tmp_path, capsys):
    """At a tiny learning rate the trained weights are those of the sorted model, and not those of `model.init`."""
    shutil.copytree(folder / "text", tmp_path / "text")
    for name in ("tiny.toml", "zero.json"):
        shutil.copy(folder / name, tmp_path)
    shutil.copytree(folder / "model", tmp_path / "model")
    run = tmp_path / "tiny.toml"
    settings = ["model.init=model", "model.sort=true", "train.steps=2", "optim.learning_rate=1e-9"]
    assert main(["plan", str(run), *settings]) == 0
    with pytest.raises(UserError, match="Run `sorted-ds prepare` with this run file first"):
        require_sorted(load_run(run, settings))
    train(run, *settings)
    made = run_dir(run) / "sorted"
    order = json.loads((made / "sorted.json").read_text())["layer_order"]
    assert json.loads((run_dir(run) / "model" / "sorted.json").read_text())["layer_order"] == order
    paths = (made, run_dir(run) / "model", tmp_path / "model")
    begun, ended, unsorted = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in paths)
    assert all((value - begun[name]).abs().max() <= 1e-6 for name, value in ended.items())
    assert any((value - unsorted[name]).abs().max() > 1e-2 for name, value in ended.items())
    capsys.readouterr()
    assert main(["prepare", str(run), *settings]) == 0, "it is sorted already"
    assert "sorted into" not in capsys.readouterr().err
    branch = [f"checkpoint.branch={run_dir(run)}@2", "train.steps=3", "run_dir=branch"]
    assert list(check_run(load_run(run, [*settings, *branch]))[1].layer_order) == order
    require_sorted(load_run(run, [*settings, *branch]))

    shutil.rmtree(made)
    assert main(["train", str(run), *settings]) == 2
    assert "Run `sorted-ds prepare` with this run file, which sorts it again." in one_error(capsys.readouterr().err)
    assert main(["prepare", str(run), *settings]) == 0
    said = capsys.readouterr().err
    assert "sorting: importance" in said
    assert "sorted into" in said
    assert main(["plan", str(run), *settings]) == 0, "it is the same order again"

    shutil.rmtree(run_dir(run) / "checkpoints")
    with pytest.raises(UserError, match=r"was not made from the weights of model\.init"):
        require_sorted(load_run(run, [*settings, f"model.init={folder / 'sorted'}"]))
    assert main(["prepare", str(run), *settings, f"model.init={folder / 'sorted'}"]) == 2
    assert "was not made from the weights of model.init" in one_error(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sort", "{0}/model", "--out", "{0}/model", "--text", "{0}/text"], "already exists. Name another --out"),
        (
            ["sort", "{0}/nowhere", "--out", "{0}/x", "--text", "{0}/text"],
            "is not a directory and cannot be downloaded",
        ),
        (
            ["sort", "{0}/model", "--out", "{0}/x", "--text", "{0}/nothing"],
            "nothing does not exist. Correct the path.",
        ),
        (["sort", "{0}/model", "--out", "{0}/x", "--text", "{0}/text", "--row-tokens", "65"], "--row-tokens = 65, but"),
        (["sort", "{0}/model", "--out", "{0}/x"], "data names no text. Set --text or --files."),
        (
            ["plan", "{0}/tiny.toml", "space.layer_order=model", "model.init=model"],
            "has no layer order. Set model.sort",
        ),
        (["plan", "{0}/plain/tiny.toml", "model.sort=true"], "has random weights. Remove model.sort."),
        (["plan", "{0}/plain/tiny.toml", "space.layer_order=model"], 'model.init = "scratch". Name the layers'),
    ],
)
def test_what_cannot_be_sorted_is_one_line(folder, capsys, arguments, message):
    if not (folder / "plain").exists():
        run_file(folder / "plain")
    capsys.readouterr()
    assert main([argument.format(folder) for argument in arguments]) == 2
    assert message.replace("{0}", str(folder)) in one_error(capsys.readouterr().err)
    assert not (folder / "x").exists()
