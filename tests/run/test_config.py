"""The run file: what is read, what is derived, and the one-line error of each mistake."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from sorted_ds.base.errors import UserError
from sorted_ds.run.config import Run
from sorted_ds.run.run_file import load_engine_config, load_run
from sorted_ds.run.section import Section
from tests.runs import run_file

ROOT = Path(__file__).parents[2]


def edited(folder: Path, old: str, new: str) -> Path:
    path = run_file(folder)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


def test_a_run_file_is_read_and_its_paths_start_at_its_folder(tmp_path):
    run = load_run(run_file(tmp_path))
    assert (run.seed, run.sampling.subnets_per_step, run.batch.row_tokens) == (17, 4, 32)
    assert run.data.text == [tmp_path / "text"]
    assert run.engine.deepspeed == tmp_path / "zero.json"
    assert run.run_dir == tmp_path / "runs" / "tiny"


def test_the_working_directory_changes_nothing(tmp_path, monkeypatch):
    path = run_file(tmp_path / "there")
    before = load_run(path)
    monkeypatch.chdir(tmp_path)
    assert load_run(Path("there/tiny.toml")) == before


def test_overrides_are_toml_values_or_plain_strings(tmp_path):
    changes = [
        "train.steps=7",
        "optim.learning_rate=1e-3",
        "sampling.strategy=uniform",
        'space.subnets=["d1-g1-f32"]',
        "model.config.hidden_size=128",
        "run_dir=2024",
        "log.tensorboard=false",
    ]
    run = load_run(run_file(tmp_path), changes)
    assert (run.train.steps, run.optim.learning_rate, run.sampling.strategy) == (7, 1e-3, "uniform")
    assert run.space.subnets == ["d1-g1-f32"]
    assert run.model.config["hidden_size"] == 128
    assert run.run_dir == tmp_path / "2024"
    assert run.log.tensorboard is False


def test_sizes_are_read_along_every_axis(tmp_path):
    space = load_run(run_file(tmp_path), ["space.layer_order=[2, 0, 1]", "space.widths=[8]"]).space
    assert space.sizes == {"depths": [1, 3], "groups": [1, 2], "ffn": [32, 64], "widths": [8]}
    assert space.layer_order == [2, 0, 1]
    assert load_run(tmp_path / "tiny.toml").space.layer_order == []


def test_the_tokenizer_is_that_of_the_checkpoint_or_trained_from_scratch(tmp_path):
    assert load_run(run_file(tmp_path)).data.tokenizer == "train"
    checkpoint = tmp_path / "llama"
    checkpoint.mkdir()
    run = load_run(tmp_path / "tiny.toml", ["model.init=llama"])
    assert (run.model.init, run.data.tokenizer) == (str(checkpoint), str(checkpoint))
    assert load_run(tmp_path / "tiny.toml", ["model.init=org/llama"]).data.tokenizer == "org/llama"


def test_a_run_does_not_change_after_it_was_read(tmp_path):
    with pytest.raises(ValidationError):
        load_run(run_file(tmp_path)).seed = 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("step_rows = 8", "step_row = 8", r"unknown key 'batch\.step_row'\. Did you mean 'batch\.step_rows'\?"),
        ("[batch]", "[bach]", r"unknown key 'bach'\. Did you mean 'batch'\?"),
        ("seed = 17", "seed = 17\nsteps = 5", r"unknown key 'steps'\. Did you mean 'train\.steps'\?"),
        ("seed = 17", "seed = 17\nzzz = 5", r"unknown key 'zzz'\. Remove it\."),
        ("row_tokens = 32", "", r"'batch\.row_tokens' is missing"),
        ("step_rows = 8", 'step_rows = "eight"', r"batch\.step_rows = 'eight' should be a valid integer"),
        ("step_rows = 8", "step_rows = 0", r"batch\.step_rows = 0 should be greater than or equal to 1"),
        ("subnets_per_step = 4", "subnets_per_step = 0", r"sampling\.subnets_per_step = 0 should be greater than or"),
        ("groups = [1, 2]", "heads = [1, 2]", r"unknown key 'space\.heads'\."),
        ("groups = [1, 2]", "groups = [1, 0]", r"space\.groups\.1 = 0 should be greater than or equal to 1"),
        (
            "groups = [1, 2]",
            "layer_order = [1, -1]",
            r"space\.layer_order\.1 = -1 should be greater than or equal to 0",
        ),
        ("[sampling]", "[schedule]", r"'schedule' was renamed to 'sampling'\. Rename it in the run file\."),
        ("[sampling]", "[sampling]\ndraws = 3", r"'sampling\.draws' was renamed to 'sampling\.subnets_per_step'\."),
        ("seed = 17", "seed = = 17", r"is not valid TOML: .*line 1"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_file_and_the_key(tmp_path, old, new, message):
    path = edited(tmp_path, old, new)
    with pytest.raises(UserError, match=message) as raised:
        load_run(path)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_a_missing_run_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"run file .*absent\.toml cannot be read: No such file"):
        load_run(tmp_path / "absent.toml")


@pytest.mark.parametrize("override", ["train.steps", "seed.x=3", "=4"])
def test_a_malformed_override_is_refused(tmp_path, override):
    with pytest.raises(UserError, match="override"):
        load_run(run_file(tmp_path), [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train_batch_size": 8}', r"sets 'train_batch_size', which follows from \[batch\] of the run file"),
        ('{"optimizer": {}}', r"sets 'optimizer', which follows from \[optim\]"),
        ('{"gradient_clipping": 1.0}', r"which follows from optim\.clip_norm"),
        ("{", r"is not valid JSON: "),
        ("[]", r"should hold a JSON object"),
        ("[" * 100_000, r"is not valid JSON: "),
    ],
)
def test_a_deepspeed_json_holds_engine_keys_only(tmp_path, content, message):
    path = tmp_path / "zero.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_engine_config(path)


def test_a_deepspeed_json_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "zero.json").write_text('\ufeff{"bf16": {}}')
    assert load_engine_config(tmp_path / "zero.json") == {"bf16": {}}


def test_every_key_has_a_meaning():
    for name, field in Run.model_fields.items():
        section = field.annotation
        if not issubclass(section, Section):
            assert field.description, name
            continue
        assert section.__doc__
        assert all(key.description for key in section.model_fields.values()), name


def test_a_run_file_extends_another_one_and_paths_start_at_their_own_file(tmp_path):
    base = run_file(tmp_path / "base")
    above = tmp_path / "above" / "mine.toml"
    above.parent.mkdir()
    above.write_text('extends = "../base/tiny.toml"\nseed = 5\n[space]\ndepths = [3]\n[train]\nsteps = 7\n')
    below, run = load_run(base), load_run(above, ["batch.step_rows=16"])
    assert (run.data.text, run.data.vocab_size) == (below.data.text, 300)
    assert run.engine.deepspeed == base.parent / "zero.json"
    assert (run.seed, run.train.steps, run.batch.step_rows, run.batch.row_tokens) == (5, 7, 16, 32)
    assert run.space.sizes == {**below.space.sizes, "depths": [3]}
    assert run.run_dir == above.parent / "runs" / "mine"
    further = tmp_path / "above" / "further.toml"
    further.write_text('extends = "mine.toml"\n[data]\ntext = ["other"]\n')
    assert load_run(further).data.text == [above.parent / "other"]
    assert load_run(further).seed == 5


@pytest.mark.parametrize(
    ("written", "overrides", "message"),
    [
        ('extends = "mine.toml"', [], "leads back to the file itself. Name another run file."),
        ('extends = "gone.toml"', [], "gone.toml cannot be read: No such file or directory. Name an existing file."),
        ("extends = 3", [], "extends = 3 is not a path. Name one run file."),
        (
            'extends = "tiny.toml"',
            ["extends=other.toml"],
            "extends was set by an override. Write it into the run file.",
        ),
        ('extends = "tiny.toml"\n[train]\nstep = 3', [], "unknown key 'train.step'. Did you mean 'train.steps'?"),
    ],
)
def test_a_run_file_that_extends_wrongly_is_one_line(tmp_path, written, overrides, message):
    run_file(tmp_path)
    path = tmp_path / "mine.toml"
    path.write_text(written)
    with pytest.raises(UserError, match=re.escape(message)):
        load_run(path, overrides)
