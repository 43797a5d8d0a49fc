"""What `train` would refuse of a checkpoint that is named in `model.init`, `plan` refuses in one line."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sorted_ds.base.errors import UserError
from sorted_ds.commands.cli import main
from sorted_ds.families import family_of
from sorted_ds.nested.load import build
from sorted_ds.run.checks import check_run
from sorted_ds.run.plan import make_plan
from sorted_ds.run.run_file import load_run
from tests.launched import SETTINGS, copied, run_dir
from tests.runs import run_file
from tests.trained import add_code, set_keys

WORDS, ROWS_MOST = 30, 64
MODEL_SECTION = """\
family = "llama"
config = { hidden_size = 64, intermediate_size = 64, num_hidden_layers = 3, num_attention_heads = 4, \
num_key_value_heads = 2, max_position_embeddings = 64 }
"""


def checkpoint(folder: Path, words: int = WORDS, tied: bool = False) -> Path:
    """A small llama and a tokenizer of `words` tokens."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=ROWS_MOST,
        vocab_size=WORDS,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(2)
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {"</s>": 0, **{f"w{number}": number for number in range(1, words)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return folder


def run_of(folder: Path) -> Path:
    """A run file whose `model.init` is the folder `model` beside it."""
    path = run_file(folder)
    text = path.read_text().replace('init = "scratch"', 'init = "model"').replace(MODEL_SECTION, "")
    assert "family" not in text
    path.write_text(text)
    return path


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def eight_bits(weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)


def deep_index(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    (model / "model.safetensors.index.json").write_text("[" * 100_000)


REFUSED = [
    (
        "pad id",
        lambda m: set_keys(m / "config.json", pad_token_id=WORDS),
        r"model/config\.json cannot be used: .*adding",
    ),
    ("no type", lambda m: set_keys(m / "config.json", model_type="nope"), r"model/config\.json cannot be used: .*nope"),
    (
        "fp8 config",
        lambda m: set_keys(m / "config.json", quantization_config={"quant_method": "fp8"}),
        r"model/config\.json has a quantization_config",
    ),
    ("fp8", lambda m: change_weights(m, eight_bits), r"layers\.1\.mlp\.up_proj\.weight is stored as F8_E4M3"),
    (
        "biases",
        lambda m: change_weights(m, lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})),
        r"model holds model\.layers\.0\.self_attn\.q_proj\.bias, which a model of its config\.json does not have",
    ),
    (
        "another layer",
        lambda m: change_weights(
            m, lambda w: w.update({k.replace("s.2.", "s.3."): v.clone() for k, v in w.items() if "s.2." in k})
        ),
        r"model holds model\.layers\.3\.\S+, \S+, \S+ and 6 more tensors, which a model",
    ),
    (
        "generation",
        lambda m: set_keys(m / "generation_config.json", max_new_tokens=-5),
        r"generation_config\.json cannot be used: .*max_new_tokens.*Correct the file, or remove it\.$",
    ),
    (
        "generation, in two lines",
        lambda m: set_keys(m / "generation_config.json", temperature=0.6, top_p=0.9),
        r"generation_config\.json cannot be used: .*temperature.*Correct the file",
    ),
    (
        "activation",
        lambda m: set_keys(m / "config.json", hidden_act="foo"),
        r"config\.json cannot be used: 'foo' is not known\. Correct",
    ),
    (
        "prefix",
        lambda m: change_weights(m, lambda w: [w.__setitem__(f"module.{name}", w.pop(name)) for name in list(w)]),
        r"names its tensors like module\.(\S+), where transformers writes \1\. Load",
    ),
    (
        "named weights",
        lambda m: set_keys(m / "config.json", transformers_weights="gone.safetensors"),
        r"holds no gone\.safetensors, which config\.json names in transformers_weights",
    ),
    ("deep index", deep_index, r"index\.json is not an index of safetensors"),
    ("pickles", lambda m: (m / "model.safetensors").rename(m / "x.bin"), r"holds neither model\.safetensors nor"),
    ("tokenizer", lambda m: (m / "tokenizer.json").write_text("{"), r"data\.tokenizer: .* cannot be loaded \("),
    (
        "larger tokenizer",
        lambda m: checkpoint(m, words=WORDS + 1),
        rf"has {WORDS + 1} tokens, but the vocabulary of \S+ has {WORDS}\. Its own tokenizer does not belong to",
    ),
    (
        "rows",
        lambda m: set_keys(m / "config.json", max_position_embeddings=16),
        r"max_position_embeddings is 16\. Set batch\.row_tokens to 16 or less\.$",
    ),
]


@pytest.mark.parametrize(("damage", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_a_checkpoint_that_training_could_not_use_is_refused_by_plan(tmp_path, damage, message, capsys):
    damage(checkpoint(tmp_path / "model"))
    assert main(["plan", str(run_of(tmp_path)), "--ranks", "1"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]  # libraries print their own warnings before
    assert last.startswith("error: ")
    with pytest.raises(UserError, match=message):
        check_run(load_run(tmp_path / "tiny.toml"))


def test_another_head_of_a_tied_checkpoint_is_refused_and_an_equal_one_is_not(tmp_path):
    model, path = checkpoint(tmp_path / "model", tied=True), run_of(tmp_path)
    change_weights(model, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    check_run(load_run(path))
    change_weights(model, lambda w: w["lm_head.weight"].mul_(2))
    with pytest.raises(UserError, match=r"another lm_head\.weight\. Set tie_word_embeddings to false in config\.json"):
        check_run(load_run(path))
    set_keys(model / "config.json", tie_word_embeddings=False)
    check_run(load_run(path))


def test_buffers_that_old_checkpoints_hold_are_no_error(tmp_path):
    model = checkpoint(tmp_path / "model")
    change_weights(model, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    check_run(load_run(run_of(tmp_path)))


def test_weights_come_from_the_file_that_transformers_takes_and_the_others_are_named(tmp_path):
    """A newer single file beside an older index and its shards."""
    model, path = checkpoint(tmp_path / "model"), run_of(tmp_path)
    change_weights(model, lambda w: w["model.norm.weight"].fill_(3.0))
    LlamaForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "old", max_shard_size="40KB")
    shards = sorted((tmp_path / "old").glob("model*"))
    assert len(shards) > 2
    for file in shards:
        file.rename(model / file.name)
    change_weights(model, lambda w: w["model.norm.weight"].fill_(7.0))
    run = load_run(path)
    config, space = check_run(run)
    (warning,) = [text for text in make_plan(run, space, config, 1).warnings if "not read" in text]
    assert all(file.name in warning for file in shards)
    taken = AutoModelForCausalLM.from_pretrained(model, local_files_only=True).get_parameter("model.norm.weight")
    ours = build(family_of("llama"), config, space, model, 0, torch.float32).get_parameter("model.norm.weight")
    assert torch.equal(ours, taken)


def test_the_file_of_weights_that_the_config_names_is_taken_as_transformers_takes_it(tmp_path):
    model, path = checkpoint(tmp_path / "model"), run_of(tmp_path)
    (tmp_path / "model" / "other.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    change_weights(model, lambda w: w["model.norm.weight"].fill_(7.0))
    set_keys(model / "config.json", transformers_weights="other.safetensors")
    run = load_run(path)
    config, space = check_run(run)
    assert any("not read: model.safetensors" in text for text in make_plan(run, space, config, 1).warnings)
    taken = AutoModelForCausalLM.from_pretrained(model, local_files_only=True).get_parameter("model.norm.weight")
    ours = build(family_of("llama"), config, space, model, 0, torch.float32).get_parameter("model.norm.weight")
    assert torch.equal(ours, taken)
    assert ours[0] == 1.0


def test_weights_that_are_not_finite_are_refused_when_they_are_read(tmp_path):
    model, path = checkpoint(tmp_path / "model"), run_of(tmp_path)
    change_weights(model, lambda w: w["model.layers.1.mlp.up_proj.weight"][40:].fill_(float("inf")))
    config, space = check_run(load_run(path))
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds a number that is not finite"):
        build(family_of("llama"), config, space, model, 0, torch.float32)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_another_end_of_text_than_the_tokenizers_is_warned_of(tmp_path, file):
    model, path = checkpoint(tmp_path / "model"), run_of(tmp_path)

    def warned() -> bool:
        run = load_run(path)
        config, space = check_run(run)
        return any("so a trained model may not stop" in text for text in make_plan(run, space, config, 1).warnings)

    set_keys(model / "config.json", eos_token_id=0)
    set_keys(model / "generation_config.json", eos_token_id=[3, 0])
    assert not warned()
    set_keys(model / "generation_config.json", eos_token_id=None)
    set_keys(model / file, eos_token_id=5)
    assert warned()


def test_numbers_that_cannot_be_right_are_refused_or_warned_of(tmp_path):
    path = run_file(tmp_path, steps=20)
    with pytest.raises(UserError, match=r"tiny\.toml: .*optim\.learning_rate.*finite"):
        load_run(path, ["optim.learning_rate=inf"])
    for number in ("optim.learning_rate=true", "train.steps=true"):
        with pytest.raises(UserError, match=r"= True should be a number\."):
            load_run(path, [number])
    for setting, warning in (
        ("optim.warmup_steps=20", "Set optim.warmup_steps below 20."),
        ("optim.learning_rate=3", "is very large for AdamW"),
        ("optim.weight_decay=1e30", "a step takes weights beyond zero"),
    ):
        run = load_run(path, [setting])
        config, space = check_run(run)
        assert any(warning in text for text in make_plan(run, space, config, 1).warnings), setting
    assert "large" not in str(make_plan(load_run(path), space, config, 1).warnings)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.skip_steps=[3, 20]", r"names step 20, but the last step is 19\. Remove it\.$"),
        (f"train.skip_steps={list(range(20))}", r"leaves none of train\.steps = 20 steps\. Remove one\.$"),
        ("train.time_limit=abc", r"train\.time_limit = 'abc' should be like 90"),
        (
            "data.cache_dir=/proc/x",
            r"data\.cache_dir = /proc/x cannot be written \(.*\)\. Set another data\.cache_dir\.$",
        ),
        ("model.init=", r"model\.init is empty\."),
    ],
)
def test_what_train_would_refuse_is_refused(tmp_path, setting, message):
    with pytest.raises(UserError, match=message):
        check_run(load_run(run_file(tmp_path, steps=20), [setting]))


def test_another_runs_directory_is_refused_before_a_job_waits_for_it(whole, tmp_path):
    run = copied(whole, tmp_path, keep_steps=8)
    check_run(load_run(run, SETTINGS))
    with pytest.raises(UserError, match=r"belongs to another run: seed = 17 there, 5 here\. Set another run_dir"):
        check_run(load_run(run, [*SETTINGS, "seed=5"]))
    with pytest.raises(UserError, match=r"has a checkpoint of step 8\. Set train\.steps to 8 or more"):
        check_run(load_run(run, [*SETTINGS, "train.steps=6"]))
    index = run_dir(run) / "checkpoints" / "step_00000008" / "checkpoint.json"
    index.write_text("damaged")
    check_run(load_run(run, SETTINGS))


def test_a_run_directory_that_cannot_be_written_is_refused(tmp_path):
    path = run_file(tmp_path)
    with pytest.raises(UserError, match=r"run_dir = /proc/runs/a cannot be written \(.*\)\. Set another run_dir\.$"):
        check_run(load_run(path, ["run_dir=/proc/runs/a"]))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/a cannot be written"):
        check_run(load_run(path, [f"run_dir={tmp_path}/file/a"]))


def test_a_run_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = run_file(tmp_path)
    path.write_text("\ufeff" + path.read_text())
    assert load_run(path).seed == 17


def test_code_in_a_checkpoints_directory_never_runs(tmp_path, monkeypatch):
    """transformers asks whether to run it where nothing is said; here the answer would be yes."""
    model = checkpoint(tmp_path / "model")
    ran = add_code(model)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    path = run_of(tmp_path)
    assert main(["plan", str(path), "--ranks", "1"]) == 0
    assert main(["prepare", str(path)]) == 0
    run = load_run(path)
    config, space = check_run(run)
    build(family_of("llama"), config, space, model, 0, torch.float32)
    assert not ran.exists()
