"""The advice of an error works: what is refused, and is then changed as the message says, is accepted.

A case breaks a run, takes the values of the advice from the message, follows it, and tries again. The last test finds
advice that no case follows.
"""

import ast
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from sorted_ds.commands.cli import main
from tests.runs import run_file
from tests.spawn import ROOT
from tests.trained import measured_run, set_keys, trained_run

Overrides = list[str]
Break = Callable[[Path], Overrides]
"""Breaks the run in a folder. Returns overrides, which may be what breaks it."""
Follow = Callable[[Path, re.Match, Overrides], Overrides]
"""Follows the advice in a folder: from the match of the message and the overrides so far to the next overrides."""


def sets(*overrides: str) -> Break:
    return lambda folder: list(overrides)


def removes(folder: Path, advice: re.Match, overrides: Overrides) -> Overrides:
    """Removes the override of the key that the advice names."""
    kept = [override for override in overrides if not override.startswith(advice[1])]
    assert len(kept) < len(overrides), f"{advice[1]} was not set"
    return kept


def removes_from_config(folder: Path, advice: re.Match, overrides: Overrides) -> Overrides:
    """Removes the override of the key of the model's config that the advice names."""
    kept = [override for override in overrides if not override.startswith(f"model.config.{advice[1]}=")]
    assert len(kept) < len(overrides), f"{advice[1]} was not set"
    return kept


def changes(override: str) -> Follow:
    """Replaces the override of a key, or adds it. Groups of the advice are written like {0}, counted from 0."""

    def follow(folder: Path, advice: re.Match, overrides: Overrides) -> Overrides:
        new = override.format(*advice.groups())
        return [*(each for each in overrides if each.split("=")[0] != new.split("=")[0]), new]

    return follow


def zero(**keys: object) -> Break:
    """Writes keys into the DeepSpeed JSON."""

    def break_it(folder: Path) -> Overrides:
        (folder / "zero.json").write_text(json.dumps(keys))
        return []

    return break_it


def rewrites(**keys: object) -> Follow:
    def follow(folder: Path, advice: re.Match, overrides: Overrides) -> Overrides:
        zero(**keys)(folder)
        return overrides

    return follow


def edits(old: str, new: str) -> Break:
    """Replaces a part of the run file."""

    def break_it(folder: Path) -> Overrides:
        path = folder / "tiny.toml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        return []

    return break_it


def checkpoint(*overrides: str, variant: str = "llama", **keys: object) -> Break:
    """Makes the run start from a checkpoint whose config has other keys."""

    def break_it(folder: Path) -> Overrides:
        trained_run(folder / "base", variant)
        set_keys(folder / "base" / "model" / "config.json", **keys)
        (folder / "base" / "model" / "sorted.json").unlink()  # an ordinary checkpoint, which no run has written
        text = (folder / "tiny.toml").read_text()
        start, stop = text.index("[model]"), text.index("[sampling]")
        space = "[space]\ndepths = [1, 4]\ngroups = [1, 4]\nffn = [32, 112]\n"
        (folder / "tiny.toml").write_text(f'{text[:start]}[model]\ninit = "base/model"\n{space}{text[stop:]}')
        return list(overrides)

    return break_it


def texts(contents: list[str]) -> Break:
    """Replaces the text files."""

    def break_it(folder: Path) -> Overrides:
        for path in (folder / "text").iterdir():
            path.unlink()
        for number, content in enumerate(contents):
            (folder / "text" / f"{number}.txt").write_text(content)
        return []

    return break_it


def other_tokenizer(folder: Path) -> Overrides:
    """Makes the run take a checkpoint, and a tokenizer that has more tokens than it."""
    checkpoint()(folder)
    shutil.copytree(folder / "base" / "model", folder / "other")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "other")
    tokenizer.add_tokens(["new1", "new2"])
    tokenizer.save_pretrained(folder / "other")
    return ["data.tokenizer=other"]


def damage_json(folder: Path) -> Overrides:
    (folder / "zero.json").write_text("[]")
    return []


def drop_key(file: Path, key: str) -> Overrides:
    contents = json.loads(file.read_text())
    del contents[key]
    file.write_text(json.dumps(contents))
    return []


def more_text(folder: Path) -> Overrides:
    shutil.copytree(run_file(folder / "again").parent / "text", folder / "text", dirs_exist_ok=True)
    return []


def damage_tokens(folder: Path) -> Overrides:
    assert main(prepare(folder, [])) == 0
    (tokens,) = (folder / "cache").glob("*/train.bin")
    tokens.write_bytes(tokens.read_bytes()[:-2])
    return []


def measured(folder: Path) -> Overrides:
    measured_run(folder / "run")
    return []


def plan(folder: Path, overrides: Overrides) -> list[str]:
    return ["plan", str(folder / "tiny.toml"), "--ranks", "1", *overrides]


def prepare(folder: Path, overrides: Overrides) -> list[str]:
    return ["prepare", str(folder / "tiny.toml"), *overrides]


def launch(folder: Path, overrides: Overrides) -> list[str]:
    return ["launch", "slurm", str(folder / "tiny.toml"), "--dry-run", *overrides]


def select(folder: Path, overrides: Overrides) -> list[str]:
    return ["select", str(folder / "run"), *overrides]


def export(folder: Path, overrides: Overrides) -> list[str]:
    return ["export", str(folder / "run"), "--subnet", "d2-g3-f80", *overrides]


@dataclass(frozen=True)
class Case:
    """Something that is refused, and what to do about it."""

    broken: Break
    advice: str
    """A regular expression that the end of the message matches; its groups are values."""
    follow: Follow
    call: Callable[[Path, Overrides], list[str]] = plan


OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
CASES = {
    # The run file
    "misspelt key": Case(
        edits("step_rows = 8", "step_row = 8"),
        r"unknown key 'batch\.step_row'\. Did you mean 'batch\.(\w+)'\?",
        lambda folder, advice, overrides: edits("step_row = 8", f"{advice[1]} = 8")(folder),
    ),
    "renamed key": Case(
        edits("subnets_per_step", "draws"),
        r"was renamed to 'sampling\.(\w+)'\. Rename it in the run file\.",
        lambda folder, advice, overrides: edits("draws", advice[1])(folder),
    ),
    "missing key": Case(
        edits("steps = 400", ""), r"'train\.steps' is missing\. Add it; .*", changes("train.steps=400")
    ),
    "override without a value": Case(
        sets("train.steps"), r"should have the form section\.key=value, like (train\.steps=\d+)\.", changes("{0}")
    ),
    "key as section": Case(sets("seed.x=3"), r"Write (seed)=value\.", lambda f, advice, o: [f"{advice[1]}=3"]),
    "too small": Case(sets("batch.step_rows=0"), r"greater than or equal to (\d+)\.", changes("batch.step_rows=8")),
    "task": Case(sets("task=vision"), r"Known: (\w+)\.", changes("task={0}")),
    "run_dir": Case(sets("run_dir=/proc/runs"), r"Set another run_dir\.", changes("run_dir=elsewhere")),
    # The space
    "subnets beside sizes": Case(
        sets('space.subnets=["d3-g2-f64"]'), r"Remove (space\.subnets), or the sizes\.", removes
    ),
    "size that does not fit": Case(
        lambda folder: [
            *edits("num_attention_heads = 4", "num_attention_heads = 16")(folder),
            *edits("num_key_value_heads = 2", "num_key_value_heads = 8")(folder),
            "space.groups=[3, 8]",
        ],
        r"Nearest that work: (\d+), (\d+)\.",
        changes("space.groups=[{0}, 8]"),
    ),
    "groups that do not divide": Case(
        sets("model.config.hidden_size=96", "model.config.num_key_value_heads=3", "space.groups=[1, 3]"),
        r"the first must be a multiple of the second\. Change one of them\.",
        changes("model.config.num_attention_heads=6"),
    ),
    "largest": Case(sets("space.ffn=[32, 48]"), r"Make d3-g2-f(\d+) the largest\.", changes("space.ffn=[32, {0}]")),
    "layer order": Case(
        sets("space.layer_order=[0, 2, 2]"),
        r"Name each number from (0) to (2) once\.",
        changes("space.layer_order=[2, {0}, 1]"),
    ),
    "layer order of a model from scratch": Case(
        sets("space.layer_order=model"),
        r"Name the layers, or in model\.init a directory that `sorted-ds sort` has written\.",
        changes("space.layer_order=[2, 1, 0]"),
    ),
    "layer order of a model that was not sorted": Case(
        checkpoint("space.layer_order=model"),
        r"has no layer order\. Set (model\.sort) = true, or name the layers\.",
        changes("model.sort=true"),
    ),
    "sorting of a model from scratch": Case(
        sets("model.sort=true"), r"has random weights\. Remove (model\.sort)\.", removes
    ),
    "size twice": Case(sets("space.depths=[3, 3, 1]"), r"Name each size once\.", changes("space.depths=[3, 1]")),
    "evaluated sub-network": Case(
        sets('eval.subnets=["d1-g1-f33"]'), r"Nearest that are: (d\d-g\d-f\d+), .*", changes('eval.subnets=["{0}"]')
    ),
    "name of a sub-network": Case(
        sets('eval.subnets=["d1:g1"]'), r"Write a size for each axis, like .*\.", changes('eval.subnets=["d1-g1-f32"]')
    ),
    # Sampling and batch
    "strategy": Case(sets("sampling.strategy=best"), r"Known: (\w+), .*", changes("sampling.strategy={0}")),
    "too few a step": Case(
        sets("sampling.strategy=sandwich", "sampling.subnets_per_step=1"),
        r"needs at least (\d+)\. Raise it\.",
        lambda folder, advice, o: ["sampling.strategy=sandwich", f"sampling.subnets_per_step={advice[1]}"],
    ),
    "sub-networks on the same rows": Case(
        sets("sampling.subnets_per_share=3"),
        r"sampling\.subnets_per_share = 3\. Change one of them\.",
        changes("sampling.subnets_per_share=2"),
    ),
    "nothing is sampled": Case(
        sets('sampling.ladder=["d1-g1-f32"]', "sampling.weights={d1-g1-f32 = 0}"),
        r"leave no sub-network to sample\. Name one more\.",
        changes('sampling.ladder=["d1-g1-f32", "d3-g2-f64"]'),
    ),
    "phase after the end": Case(
        sets('sampling.phases=[{from_step = 400, strategy = "full"}]'),
        r"but the last step is 399\. Remove that phase\.",
        changes("sampling.phases=[]"),
    ),
    "exits": Case(
        sets("loss.exit_weight=0.3", "space.layer_order=[2, 1, 0]"),
        r"Remove loss\.exit_weight, (space\.layer_order), or change the space\.",
        removes,
    ),
    "exit rate alone": Case(
        sets("loss.exit_rate=0.5"),
        r"Set loss\.exit_weight, or remove loss\.exit_rate\.",
        lambda folder, advice, overrides: [*overrides, "loss.exit_weight=0.3"],
    ),
    "trained tokenizer and a teacher": Case(
        checkpoint("data.tokenizer=train", "data.vocab_size=120", "loss.teacher=base/model"),
        r"has a tokenizer of its own, but data\.tokenizer = .*\. Set data\.tokenizer = (.+)\.",
        changes("data.tokenizer={0}"),
    ),
    "kept step after the end": Case(
        sets("checkpoint.keep_steps=[401]"),
        r"the run ends after 400\. Remove it\.",
        changes("checkpoint.keep_steps=[400]"),
    ),
    "decay of a constant rate": Case(
        sets("optim.decay=constant", "optim.decay_steps=5"),
        r"but (optim\.decay) = \"constant\"\. Remove one of them\.",
        lambda folder, advice, overrides: ["optim.decay_steps=5"],
    ),
    "branch": Case(
        sets("checkpoint.branch=here"),
        r"should be RUN_DIR@STEP, like runs/a@4000\.",
        lambda folder, advice, overrides: [],
    ),
    "rows a step": Case(sets("batch.step_rows=9"), r"Nearest that can: (\d+).*", changes("batch.step_rows={0}")),
    "rows longer than the model": Case(
        sets("batch.row_tokens=65"),
        r"Set batch\.row_tokens to (\d+) or less, or raise the other\.",
        changes("batch.row_tokens={0}"),
    ),
    "positions of the model": Case(
        sets("batch.row_tokens=65"),
        r"max_position_embeddings is 64\. Set .* or raise the other\.",
        changes("model.config.max_position_embeddings=65"),
    ),
    "rows longer than the checkpoint": Case(
        checkpoint("batch.row_tokens=65"),
        r"Set batch\.row_tokens to (\d+) or less(.*)\.",
        changes("batch.row_tokens={0}"),
    ),
    # The model
    "attention": Case(
        lambda folder: [*edits('family = "llama"', 'family = "gemma2"')(folder), "model.attention=sdpa"],
        r'Set "(\w+)", or remove the key\.',
        changes("model.attention={0}"),
    ),
    "family of a checkpoint": Case(
        checkpoint("model.family=llama"), r"Remove (model\.family) and model\.config, or set .*", removes
    ),
    "unknown family": Case(
        edits('family = "llama"', 'family = "lama"'), r"Known: (\w+), .*", changes("model.family={0}")
    ),
    "misspelt config": Case(
        edits("num_hidden_layers", "num_hiden_layers"),
        r"Did you mean '(\w+)'\?",
        lambda folder, advice, overrides: edits("num_hiden_layers", advice[1])(folder),
    ),
    "dropout": Case(sets("model.config.attention_dropout=0.1"), r"Remove (\w+)\.", removes_from_config),
    "refused value": Case(
        sets("model.config.hidden_size=65"),
        r"Correct the value in model\.config\.",
        changes("model.config.hidden_size=64"),
    ),
    "vocabulary": Case(
        sets("model.config.vocab_size=100"), r"Remove (vocab_size) from model\.config, .*", removes_from_config
    ),
    "tokenizer of another model": Case(
        other_tokenizer, r"Remove (data\.tokenizer) to use the checkpoint's own tokenizer\.", removes
    ),
    "tied head": Case(
        checkpoint(tie_word_embeddings=True),
        r"Set (tie_word_embeddings) to (false) in config\.json to keep it, or remove it from the file\.",
        lambda folder, advice, overrides: set_keys(folder / "base/model/config.json", tie_word_embeddings=False) or [],
    ),
    "quantised": Case(
        checkpoint(quantization_config={"quant_method": "fp8"}),
        r"or save a dequantised copy without this key\.",
        lambda folder, advice, overrides: drop_key(folder / "base/model/config.json", "quantization_config"),
    ),
    "config of other weights": Case(
        checkpoint(variant="llama, biases", attention_bias=False),
        r"Correct config\.json, or name another checkpoint\.",
        lambda folder, advice, overrides: set_keys(folder / "base/model/config.json", attention_bias=True) or [],
    ),
    # DeepSpeed and the optimizer
    "key of the run file": Case(
        zero(train_batch_size=8),
        r"sets '(\w+)', .* Remove it from the JSON\.",
        rewrites(zero_optimization={"stage": 1}),
    ),
    "damaged JSON": Case(
        damage_json,
        r"Write (\{\}) for DeepSpeed's defaults\.",
        rewrites(),
    ),
    "offload without ZeRO": Case(
        zero(zero_optimization={"stage": 0, "offload_optimizer": {"device": "cpu"}}),
        r"Set zero_optimization\.stage to 1, (2) or 3\.",
        rewrites(**OFFLOAD),
    ),
    "offloaded parameters": Case(
        zero(zero_optimization={"stage": 2, "offload_param": {"device": "cpu"}}),
        r"at stage 3 together with offload_optimizer\. Set both, or leave it out\.",
        rewrites(
            zero_optimization={
                "stage": 3,
                "offload_param": {"device": "cpu"},
                "offload_optimizer": {"device": "cpu"},
            }
        ),
    ),
    "overlap": Case(
        zero(zero_optimization={"stage": 1, "overlap_comm": True}),
        r"Set it to false, or use stage (2) or 3\.",
        rewrites(zero_optimization={"stage": 2, "overlap_comm": True}),
    ),
    "compile": Case(
        lambda folder: [*zero(zero_optimization={"stage": 3})(folder), "engine.compile=true"],
        r"Set (engine\.compile) to (false), or the stage to 0, 1 or 2\.",
        changes("{0}={1}"),
    ),
    "accumulation": Case(
        zero(zero_optimization={"stage": 0}, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"}),
        r"Remove (data_types\.grad_accum_dtype), or use stage 1, 2 or 3\.",
        rewrites(zero_optimization={"stage": 0}, bf16={"enabled": True}),
    ),
    "section that is no object": Case(zero(bf16=True), r"should be an object, like (\{\})\.", rewrites(bf16={})),
    "value that was not compared": Case(zero(zero_optimization={"stage": 4}), r"leave it out\.", rewrites()),
    "AdamW's implementation": Case(
        sets("optim.name=sgd", "optim.implementation=fused"),
        r'Set the implementation to "(\w+)", or the name to "adamw"\.',
        changes("optim.implementation={0}"),
    ),
    "AdamW on the CPU": Case(
        sets("optim.implementation=cpu_adam"),
        r'or the implementation to "(\w+)"\.',
        changes("optim.implementation={0}"),
    ),
    "AdamW on the CPU, offloaded": Case(
        sets("optim.implementation=cpu_adam"),
        r"Set zero_optimization\.offload_optimizer in the DeepSpeed JSON, or .*",
        rewrites(**OFFLOAD),
    ),
    # Data
    "no text": Case(sets("data.text=[]"), r"Set (data\.text) or data\.files\.", changes('{0}=["text"]')),
    "wrong path": Case(
        sets('data.text=["texts"]'), r"Correct the path \(relative to the run file\)\.", changes('data.text=["text"]')
    ),
    "suffixes": Case(sets('data.suffixes=[".rst"]'), r"set (data\.suffixes) = (\[.*\])\.", changes("{0}={1}")),
    "BOS": Case(checkpoint("data.bos=true"), r"Remove (data\.bos)\.", removes),
    "vocabulary too large": Case(
        sets("data.vocab_size=30000"), r"Set (\d+) or less\.", changes("data.vocab_size={0}"), prepare
    ),
    "vocabulary too small": Case(
        sets("data.vocab_size=5"), r"Set (\d+) or more\.", changes("data.vocab_size={0}"), prepare
    ),
    "rows longer than the text": Case(
        sets("batch.row_tokens=40000", "model.config.max_position_embeddings=40000"),
        r"Use more text, .*or shorter rows\.",
        changes("batch.row_tokens=32"),
        prepare,
    ),
    "empty text": Case(
        texts([" \n"]),
        r"Name other files in (data\.text) or data\.files\.",
        lambda folder, advice, overrides: more_text(folder),
        prepare,
    ),
    "one document": Case(
        texts(["one line\n" * 2000]),
        r"Use several files, or JSONL with a document on each line\.",
        lambda folder, advice, overrides: more_text(folder),
        prepare,
    ),
    "damaged tokens": Case(
        damage_tokens,
        r"Delete the folder and run `sorted-ds (prepare) RUN\.toml` again\.",
        lambda folder, advice, overrides: shutil.rmtree(next((folder / "cache").glob("*/tokenizer")).parent) or [],
        prepare,
    ),
    # Launch, select, export
    "array": Case(
        sets("--sbatch=--array=0-3"),
        r"(--sbatch) cannot take --array, .*`sbatch --array 0-3 launch/slurm\.sbatch RUN\.toml`\.",
        removes,
        launch,
    ),
    "short option": Case(
        sets("--sbatch=-p a100"), r"like (--sbatch=--partition=a100)\.", lambda f, advice, o: [advice[1]], launch
    ),
    "no budget": Case(measured, r"Give (--max-params), .* or --min-accuracy\.", changes("{0}=1G"), select),
    "amount": Case(
        lambda folder: [*measured(folder), "--max-params=many"],
        r"Write a number above zero like 2\.5B, (300M) or 1e6\.",
        changes("--max-params={0}"),
        select,
    ),
    "budget too small": Case(
        lambda folder: [*measured(folder), "--max-params=10"],
        r"Select with (--max-params) (\d+)\.",
        changes("{0}={1}"),
        select,
    ),
    "an --out that exists": Case(
        lambda folder: [*measured(folder), f"--out={folder / 'run'}"],
        r"Name another --out, or delete it\.",
        lambda folder, advice, overrides: [f"--out={folder / 'small'}"],
        export,
    ),
    "another sub-network": Case(
        lambda folder: [*measured(folder), f"--out={folder / 'small'}", "--subnet=d2-g3-f81"],
        r"Nearest that can: (d\d-g\d-f\d+), .*",
        changes("--subnet={0}"),
        export,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_the_advice_says_is_accepted(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_file(tmp_path)
    case = CASES[name]
    overrides = case.broken(tmp_path)
    capsys.readouterr()
    assert main(case.call(tmp_path, overrides)) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ")
    assert "\n" not in message
    advice = re.search(f"{case.advice}$", message)
    assert advice, message
    overrides = case.follow(tmp_path, advice, overrides)
    assert main(case.call(tmp_path, overrides)) == 0, capsys.readouterr().err


KEYS = re.compile(
    r"\b(batch|data|loss|train|optim|space|sampling|model|engine|eval|checkpoint|zero_optimization|data_types)\.[a-z_]+"
    r"|run_dir|config\.json|`|--[a-z]|MASTER"
)
"""What advice names that can be followed by a program: keys, files and commands."""
ELSEWHERE = {
    "is in use by another run": "tests/run/test_train_errors.py",
    "holds the buffers of another model": "tests/checkpoint/test_buffers.py",
    "and no other checkpoint in {} is intact": "tests/checkpoint/test_damage.py",
    "or remove checkpoint.strict": "tests/checkpoint/test_damage.py",
    "Put run_dir on a file system that all ranks see": "tests/run/test_train_errors.py",
    "belongs to another run": "tests/checkpoint/test_identity.py",
    "A space can only grow": "tests/checkpoint/test_identity.py",
    "start with --extend-space": "tests/checkpoint/test_checkpoint.py",
    "but this version reads format": "tests/checkpoint/test_damage.py",
    "so it belongs to another model": "tests/checkpoint/test_damage.py",
    "did not find the other ranks": "tests/cluster/test_rendezvous.py",
    "but this machine shows {} GPUs": "tests/commands/test_cli.py",
    "MPI": "tests/cluster/test_rendezvous.py",
    "mpi4py": "tests/cluster/test_rendezvous.py",
    "SLURM_STEP_NODELIST": "tests/cluster/test_rendezvous.py",
    "is not prepared": "tests/data/test_prepare.py",
    "Name the tokenizer of a chat model in data.tokenizer": "tests/data/test_chat.py",
    "but data.text is set too. Remove data.text": "tests/data/test_chat.py",
    "of a record, by default {}. Name {} in data.fields": "tests/data/test_chat.py",
    "Remove batch.isolate": "tests/tasks/test_isolation.py",
    "Correct data.split": "tests/data/test_formats.py",
    "Correct data.files or data.subset": "tests/data/test_formats.py",
    "Set data.fields to one of them": "tests/data/test_formats.py",
    "which is not installed. Run `pip install": "tests/data/test_formats.py, tests/deploy/test_harness.py",
    "say how --tasks are run. Add --tasks": "tests/deploy/test_harness.py",
    "runs causal language models": "for a family of another kind, which no release has yet",
    "lm_eval cannot run": "tests/deploy/test_harness.py",
    "data.sources need a tokenizer that exists": "tests/run/test_mixture_run.py",
    "data.sources are set together with": "tests/run/test_mixture_run.py",
    "has a weight for {}, but data.sources has": "tests/run/test_mixture_run.py",
    "data could not be prepared": "tests/data/test_prepare.py",
    "SentencePiece could not train": "for an error of SentencePiece that is not known",
    "should be in {}, which does not exist": "tests/deploy/test_evaluate.py",
    "on another number of validation rows": "tests/deploy/test_evaluate.py",
    "could not be written": "tests/deploy/test_export.py",
    "are not finite, although the weights are": "tests/deploy/test_export.py",
    "--draft-tokens needs a draft": "tests/deploy/test_generate.py",
    "has no measured sub-networks": "tests/deploy/test_select.py",
    "the table has no {}": "tests/deploy/test_select.py",
    "no loss of the full network": "tests/deploy/test_select.py",
    "has no measured speeds": "tests/deploy/test_measure.py",
    "too few to predict others": "tests/deploy/test_mix.py",
    "has no speeds for": "tests/deploy/test_measure.py",
    "say what --measure measures": "tests/deploy/test_measure.py",
    "say for what a speed is": "tests/deploy/test_measure.py",
    "has no key/value cache": "tests/deploy/test_measure.py",
    "cannot be written: {}. Set another run_dir": "tests/commands/test_launch.py",
    "is installed. sorted_ds changes how": "tests/engine/test_modes.py",
    "could not compile its AdamW": "tests/engine/test_modes.py",
    "has no checkpoint of step {}. {}": "tests/run/test_branch.py",
    "but the max_position_embeddings of {} = {}": "tests/run/test_loss_terms.py",
    "already exists. Name another --out": "tests/run/test_sorting.py",
    "Run `sorted-ds prepare` with this run file first": "tests/run/test_sorting.py",
    "which sorts it again": "tests/run/test_sorting.py",
    "was not made from the weights of model.init": "tests/run/test_sorting.py",
    "has a checkpoint of step": "tests/run/test_train_errors.py",
    "To go on from there without this step": "tests/run/test_train_errors.py",
}
"""Parts of messages whose advice needs ranks, a cluster or a broken machine -> where they are tested."""


def template(node: ast.expr) -> str:
    """Returns the text of a message, with {} for each value."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "{}"


def advice_of_the_package() -> list[str]:
    """The templates of all errors whose advice names a key, a file or a command."""
    found = []
    for path in sorted((ROOT / "sorted_ds").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("UserError", "AgreedError"):
                text = " ".join(map(template, node.args))
                if KEYS.search(text.partition(". ")[2] or text):
                    found.append(text)
    return found


def has_end_of(text: str, advice: str) -> bool:
    """Whether a template has all that the advice of a case says literally, if that is more than a few words."""
    plain = re.sub(r"\(([\w.=\\-]+)\)", lambda group: group[1] if not re.search(r"\\[a-z]", group[1]) else "()", advice)
    literal = re.split(r"\([^()]*\)|\.\*|\[[^]]*\]\+", plain)
    parts = [re.sub(r"\\(.)", r"\1", part) for part in literal]
    return len("".join(parts)) > len("Set  or less.") and all(part in text for part in parts)


def test_every_advice_is_followed():
    texts = advice_of_the_package()
    assert len(texts) > 40
    known = [*ELSEWHERE, *(case.advice for case in CASES.values())]
    left = [text for text in texts if not any(part in text or has_end_of(text, part) for part in known)]
    assert left == []
    unused = [part for part in ELSEWHERE if not any(part in text for text in texts)]
    assert unused == []
