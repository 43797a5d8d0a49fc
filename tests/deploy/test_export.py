"""An exported sub-network is an ordinary Hugging Face model with the nested model's logits, or nothing at all."""

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from sorted_ds.base.errors import UserError
from sorted_ds.data.text.tokenizer import load_tokenizer, train_tokenizer
from sorted_ds.deploy import export as export_module
from sorted_ds.deploy.export import LogitsDifferError, export
from sorted_ds.deploy.model_dir import ModelDir
from sorted_ds.nested import extract
from sorted_ds.space import SubNet
from sorted_ds.tasks.causal_lm import PROBE_TEXT
from tests.batches import TASK
from tests.families import VARIANTS
from tests.parity import run_reference
from tests.trained import load_nested, made_up_table, measured_run, set_keys, trained_run

SUBNET = "d2-g3-f80"


def exported(run: Path, out: Path, name: str = SUBNET, **kwargs) -> Path:
    return export(run, [name], [out], **kwargs)[0]


def in_one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_loads_as_a_plain_model_with_the_full_models_masked_logits(variant, tmp_path):
    run = trained_run(tmp_path / "run", variant)
    out = exported(run, tmp_path / "small")
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert (plain.config.num_hidden_layers, plain.config.num_key_value_heads) == (2, 3)
    assert plain.config.intermediate_size == 80
    ids = torch.arange(40).view(2, 20)
    full = AutoModelForCausalLM.from_pretrained(run / "model")
    expected = run_reference(full, SubNet.parse(SUBNET), ids).logits
    assert (plain(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_a_layer_order_the_files_hold_the_chosen_layers(variant, tmp_path):
    order = (3, 1, 0, 2)
    run = trained_run(tmp_path / "run", variant, layer_order=order)
    out = exported(run, tmp_path / "small")
    plain = AutoModelForCausalLM.from_pretrained(out)
    full = AutoModelForCausalLM.from_pretrained(run / "model")
    kinds = getattr(full.config, "layer_types", None)
    assert getattr(plain.config, "layer_types", None) == (kinds and [kinds[1], kinds[3]])
    ids = torch.arange(40).view(2, 20)
    expected = run_reference(full, SubNet.parse(SUBNET), ids, order).logits
    assert (plain(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    prefix = run_reference(full, SubNet.parse(SUBNET), ids).logits
    assert (plain(ids).logits - prefix).abs().max() > 1e-2 * expected.abs().max()
    assert "2 layers (numbers 1, 3, counted from 0)" in (out / "README.md").read_text()


def test_bf16_weights_are_written_as_they_are_stored(tmp_path):
    run = trained_run(tmp_path / "run", dtype=torch.bfloat16)
    plain = AutoModelForCausalLM.from_pretrained(exported(run, tmp_path / "small"))
    assert plain.dtype == torch.bfloat16
    cut = extract(load_nested(run), SUBNET).state_dict()
    assert all(torch.equal(tensor, cut[name]) for name, tensor in plain.state_dict().items())


def test_the_tokenizer_and_the_generation_config_come_along(tmp_path):
    run = trained_run(tmp_path / "run")
    settings = run / "model" / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "temperature": 0.6, "do_sample": True}))
    out = exported(run, tmp_path / "small")
    text = "def f(x):\n    return x"
    assert AutoTokenizer.from_pretrained(out)(text).input_ids == [ord(c) for c in text]
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.temperature == 0.6


def test_a_family_whose_class_would_read_the_tokenizer_otherwise_is_told_from_the_card(tmp_path):
    """transformers takes Qwen2Tokenizer for every directory of qwen2, whatever the tokenizer is."""
    run = trained_run(tmp_path / "run", "qwen2, biases, sliding", vocab_size=400)
    train_tokenizer([Path(__file__).read_text()], 400, run / "model")
    expected = load_tokenizer(str(run / "model"))(PROBE_TEXT).input_ids
    out = exported(run, tmp_path / "small")
    assert AutoTokenizer.from_pretrained(out)(PROBE_TEXT).input_ids != expected
    assert PreTrainedTokenizerFast.from_pretrained(out)(PROBE_TEXT).input_ids == expected
    assert load_tokenizer(str(out))(PROBE_TEXT).input_ids == expected
    snippet = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "AutoTokenizer would read" in snippet
    assert "tokenizer = PreTrainedTokenizerFast.from_pretrained" in snippet
    subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, check=True)


FROM_CHECKPOINT = {"trained_from": "checkpoint"}
LICENSED = {**FROM_CHECKPOINT, "license": "apache-2.0", "base_model": "someone/base"}


@pytest.mark.parametrize(
    ("base", "files", "header", "said"),
    [
        (None, [], "", "not known what the network was trained from, and under which license. Find out"),
        (None, ["LICENSE"], "", "These files came with it: [LICENSE](LICENSE)."),
        ({"trained_from": "scratch"}, [], "", "was trained from scratch and carries no license. Add one"),
        ({"trained_from": "scratch"}, ["LICENSE"], "", "from scratch. Its license is in [LICENSE](LICENSE)."),
        (FROM_CHECKPOINT, [], "", "came without a license"),
        (FROM_CHECKPOINT, ["LICENSE"], "", "is in [LICENSE](LICENSE)"),
        (FROM_CHECKPOINT, ["LICENSES/mit.txt", "LICENSES/a/b.txt"], "", "is in [LICENSES/](LICENSES/)."),
        (
            {**FROM_CHECKPOINT, "license": "no", "license_link": "docs/legal text.md"},
            ["docs/legal text.md"],
            "license: 'no'\nlicense_link: docs/legal text.md\n",
            "`no` ([docs/legal text.md](docs/legal%20text.md)).",
        ),
        (
            {**FROM_CHECKPOINT, "license": ["mit", "apache-2.0"]},
            [],
            "license:\n- mit\n- apache-2.0\n",
            "under the licenses of its base model: `mit`, `apache-2.0`.",
        ),
        (
            LICENSED,
            ["LICENSE.txt", "NOTICE"],
            "license: apache-2.0\nbase_model: someone/base\n",
            "`apache-2.0` ([LICENSE.txt](LICENSE.txt), [NOTICE](NOTICE)).",
        ),
    ],
)
def test_the_license_of_the_base_model_comes_along(base, files, header, said, tmp_path):
    run = trained_run(tmp_path / "run")
    where = ModelDir.find(run)
    where.write(replace(where.read(), base=base))
    for name in files:
        (run / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (run / "model" / name).write_text(f"terms of {name}")
    out = exported(run, tmp_path / "small")
    card = (out / "README.md").read_text()
    assert f"pipeline_tag: text-generation\n{header}tags:" in card
    assert said in in_one_line(card.split("## License")[1])
    assert [(out / name).read_text() for name in files] == [f"terms of {name}" for name in files]
    assert ModelCard.load(out / "README.md").data.license == (base or {}).get("license")


def test_the_card_states_the_measured_figures_and_its_snippet_runs(tmp_path):
    out = exported(measured_run(tmp_path / "run"), tmp_path / "small")
    card = (out / "README.md").read_text()
    text = in_one_line(card)
    row = next(row for row in made_up_table() if row.subnet == SUBNET)
    assert f"| {row.loss:.4f} |" in card
    assert f"| {row.parameters:,} |" in card
    assert "It has the first 2 layers of `d4-g4-f112`, and in each of them the first 3 attention groups" in text
    assert " and the first 80 ffn channels." in text
    assert "The loss of a unigram model is 4.5000." in text
    snippet = card.split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The")


def test_the_paragraphs_of_the_card_have_even_lines(tmp_path):
    card = (exported(measured_run(tmp_path / "run"), tmp_path / "small") / "README.md").read_text()
    prose = [part for part in card.split("```")[0].split("\n\n") if part[:1].isalpha()]
    assert len(prose) == 4
    for paragraph in prose:
        assert paragraph.split("\n") == textwrap.wrap(paragraph, 100, break_long_words=False, break_on_hyphens=False), (
            paragraph
        )


def test_the_tokenizers_config_does_not_say_where_it_was_read(tmp_path):
    out = exported(trained_run(tmp_path / "run"), tmp_path / "small")
    assert not {"is_local", "local_files_only"} & json.loads((out / "tokenizer_config.json").read_text()).keys()


def test_the_card_of_an_unmeasured_model_says_so(tmp_path):
    out = exported(trained_run(tmp_path / "run"), tmp_path / "small")
    assert "was not measured" in (out / "README.md").read_text()


def test_parameters_on_disk_are_those_of_the_table(tmp_path):
    out = exported(measured_run(tmp_path / "run"), tmp_path / "small")
    on_disk = sum(tensor.numel() for tensor in load_file(out / "model.safetensors").values())
    assert on_disk == next(row.parameters for row in made_up_table() if row.subnet == SUBNET)


def test_stored_logits_equal_those_of_a_process_without_this_package(tmp_path):
    out = exported(trained_run(tmp_path / "run"), tmp_path / "small", store_logits=True)
    script = f"""
import sys
sys.modules["sorted_ds"] = None
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
stored = load_file("{out}/logits.safetensors")
logits = AutoModelForCausalLM.from_pretrained("{out}")(stored["input_ids"]).logits
print(float((logits - stored["logits"]).abs().max() / stored["logits"].abs().max()))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 1e-5


@pytest.mark.parametrize("tensor", ["model.layers.1.self_attn.o_proj.weight", "model.layers.0.mlp.gate_proj.weight"])
def test_a_difference_leaves_nothing_behind(tensor, tmp_path, monkeypatch):
    run, out = trained_run(tmp_path / "run"), tmp_path / "outs" / "small"
    write = export_module._write

    def write_wrongly(model, task, where, subnet, hidden, name):
        write(model, task, where, subnet, hidden, name)
        weights = load_file(hidden / "model.safetensors")
        weights[tensor][0, 0] += 0.01
        save_file(weights, hidden / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(export_module, "_write", write_wrongly)
    with pytest.raises(LogitsDifferError, match=f"{SUBNET} was not exported: the written model's logits differ"):
        exported(run, out)
    assert list(out.parent.iterdir()) == []


def test_a_weight_that_is_no_number_is_refused_and_named(tmp_path):
    run = trained_run(tmp_path / "run")
    weights = load_file(run / "model" / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, run / "model" / "model.safetensors", metadata={"format": "pt"})
    message = rf"{run}/model/model.safetensors: model\.norm\.weight holds a number that is not finite"
    with pytest.raises(UserError, match=message):
        exported(run, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_logits_that_are_no_numbers_are_refused(tmp_path):
    run = trained_run(tmp_path / "run")
    set_keys(run / "model" / "config.json", rms_norm_eps=-5.0)
    with pytest.raises(UserError, match=rf"{run}/model: the logits of {SUBNET} are not finite"):
        exported(run, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_model_whose_logits_are_all_zero_is_exported(tmp_path):
    run = trained_run(tmp_path / "run")
    weights = load_file(run / "model" / "model.safetensors")
    weights["model.norm.weight"].zero_()
    save_file(weights, run / "model" / "model.safetensors", metadata={"format": "pt"})
    assert exported(run, tmp_path / "small").is_dir()


def test_several_are_written_each_to_its_place(tmp_path):
    names = ["d1-g1-f32", "d4-g4-f112"]
    outs = export(trained_run(tmp_path / "run"), names, [tmp_path / "all" / name for name in names])
    depths = [LlamaForCausalLM.from_pretrained(out).config.num_hidden_layers for out in outs]
    assert depths == [1, 4]


def test_the_comparison_uses_text_and_the_whole_vocabulary(tmp_path):
    run = trained_run(tmp_path / "run")
    probe = TASK.probe(run / "model", load_nested(run).config)
    assert list(probe) == ["input_ids"]
    ids = probe["input_ids"]
    assert bytes(ids[0].tolist()).startswith(b"The quick brown fox")
    assert ids.shape == (4, 64)
    assert ids[1:].max() > 120


def test_an_existing_out_is_refused_and_kept(tmp_path):
    out = tmp_path / "small"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="already exists"):
        exported(trained_run(tmp_path / "run"), out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_an_out_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        exported(trained_run(tmp_path / "run"), tmp_path / "file" / "small")


def test_an_unknown_sub_network_is_refused_with_near_ones(tmp_path):
    with pytest.raises(UserError, match=r"d2-g3-f81 cannot be cut from this family\. Nearest that can: d2-g3-f80"):
        exported(trained_run(tmp_path / "run"), tmp_path / "small", "d2-g3-f81")


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    run = trained_run(tmp_path / "run")
    for path in (run / "model").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        exported(run, tmp_path / "small")
