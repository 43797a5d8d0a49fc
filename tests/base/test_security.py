"""A user's paths reach no shell, a user's secrets reach no file, and written files follow the umask."""

import os
import shutil
from pathlib import Path

from sorted_ds.commands.cli import main
from sorted_ds.nested import extract
from tests.launched import run_dir, train_by_command
from tests.runs import run_file
from tests.trained import add_code, load_nested

ODD = 'it\'s "a" $(touch pwned) `touch pwned` b;c&d'
SECRET = "hf_ThisMustNotBeSeen"
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")


def test_a_run_works_in_an_oddly_named_folder_and_writes_no_secret(tmp_path):
    run = run_file(tmp_path / ODD)
    output = train_by_command(run, "train.steps=2", env={**os.environ, **dict.fromkeys(TOKENS, SECRET)})
    assert (run_dir(run) / "model" / "config.json").is_file()
    assert not list(Path.cwd().glob("pwned")) + list(tmp_path.rglob("pwned"))
    assert SECRET not in output
    files = [path for path in run_dir(run).rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_code_in_a_trained_models_directory_never_runs(whole, tmp_path, monkeypatch):
    """transformers asks whether to run it where nothing is said; here the answer would be yes."""
    run = Path(shutil.copytree(run_dir(whole), tmp_path / "run"))
    ran = add_code(run / "model")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert main(["eval", str(run)]) == 0
    assert main(["select", str(run), "--max-params", "1G"]) == 0
    assert main(["export", str(run), "--subnet", "d1-g1-f32", "--out", str(tmp_path / "small")]) == 0
    assert extract(load_nested(run), "d1-g2-f32").config.num_hidden_layers == 1
    assert not ran.exists()


def test_files_follow_the_umask(whole, tmp_path):
    """safetensors by itself would write private files. Checked for a run and for an exported model."""
    run = Path(shutil.copytree(run_dir(whole), tmp_path / "run"))
    before = os.umask(0o027)
    try:
        assert main(["export", str(run), "--subnet", "d1-g1-f32", "--out", str(tmp_path / "small")]) == 0
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "small").iterdir()}
    assert set(modes.values()) == {0o640}, modes
    written = [path for path in run_dir(whole).rglob("*") if path.is_file() and path.suffix == ".safetensors"]
    assert {path.stat().st_mode & 0o777 for path in written} == {0o666 & ~before}
