"""A run that branches off from a checkpoint of another one trains as one that had its settings all along."""

import shutil

import pytest
import torch

from sorted_ds.checkpoint.folders import published_checkpoints
from sorted_ds.commands.cli import main
from sorted_ds.run.config import Optim
from sorted_ds.run.learning_rate import lr_at
from sorted_ds.run.run_file import load_run
from tests.launched import masters, metrics, one_error, run_dir, train
from tests.runs import run_file

KEPT = 4
TRUNK = ["train.steps=12", "optim.decay_steps=3", f"checkpoint.keep_steps=[{KEPT}]", "checkpoint.keep_last=1"]
"""A run that is at its peak until step 8."""
SHORT = ["train.steps=8", "optim.decay_steps=3"]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """Returns the run file of a run whose checkpoint of step 4 was kept."""
    run = run_file(tmp_path_factory.mktemp("trunk"))
    train(run, *TRUNK)
    return run


def branch_of(run, name: str):
    """Returns a copy of the run file with another name, and so another run_dir."""
    return shutil.copy(run, run.with_name(f"{name}.toml"))


def origin(run, step: int = KEPT) -> str:
    return f"checkpoint.branch={run_dir(run)}@{step}"


def test_a_kept_checkpoint_is_not_deleted(trunk):
    found = [path.name for path in published_checkpoints(run_dir(trunk) / "checkpoints")]
    assert found == ["step_00000004", "step_00000012"]


def test_a_branch_ends_bit_equal_to_the_run_with_its_settings(trunk, tmp_path):
    """Both are at the peak of the learning rate until step 4, on the same rows."""
    alone = run_file(tmp_path / "alone")
    train(alone, *SHORT)
    branch = branch_of(trunk, "branch")
    said = train(branch, *SHORT, origin(trunk))
    assert "resuming from the checkpoint of step 4" in said
    a, b = masters(alone), masters(branch)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert min(row["step"] for row in metrics(branch)) > KEPT
    assert (masters(trunk, KEPT)["lm_head.weight"] == masters(branch, KEPT)["lm_head.weight"]).all()


def test_a_branch_resumes_from_its_own_checkpoint(trunk):
    branch = branch_of(trunk, "resumed")
    train(branch, *SHORT, origin(trunk))
    whole = masters(branch)
    for folder in ("checkpoints/step_00000008", "model"):
        shutil.rmtree(run_dir(branch) / folder)
    said = train(branch, *SHORT, origin(trunk, step=999))
    assert "resuming from the checkpoint of step 4" in said, "its own copy, so the other run's is not looked for"
    assert all(torch.equal(whole[name], value) for name, value in masters(branch).items())


def test_a_branch_may_have_other_data_and_sampling_and_another_stage(trunk):
    branch = branch_of(trunk, "other")
    (branch.parent / "text2").mkdir()
    for number in range(20):
        (branch.parent / "text2" / f"{number}.txt").write_text(f"Another text, number {number}. " * 60)
    (branch.parent / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    changed = [
        'data.text=["text2"]',
        "sampling.strategy=full_plus",
        "batch.step_rows=16",
        "engine.deepspeed=zero3.json",
    ]
    train(branch, *SHORT, *changed, origin(trunk), ranks=1)
    assert published_checkpoints(run_dir(branch) / "checkpoints")[-1].name == "step_00000008"


def test_what_cannot_branch_is_refused_by_plan_in_one_line(trunk, capsys):
    def refused(*overrides: str) -> str:
        assert main(["plan", str(branch_of(trunk, "refused")), *overrides]) == 2
        return one_error(capsys.readouterr().err)

    assert "should be RUN_DIR@STEP, like runs/a@4000" in refused("checkpoint.branch=runs/a")
    assert "has no checkpoint of step 5. It has 4, 12; a run keeps" in refused(origin(trunk, 5))
    assert "It has none" in refused("checkpoint.branch=nowhere@4")
    assert "belongs to another run: model.hidden_size = 64 there, 128 here" in refused(
        origin(trunk), "model.config.hidden_size=128"
    )
    assert "train.steps = 3, but" in refused(origin(trunk), "train.steps=3")


def test_the_command_line_names_a_branch_from_where_the_user_is(trunk, monkeypatch, capsys):
    monkeypatch.chdir(trunk.parent)
    assert main(["prepare", str(trunk), "--branch", "runs/tiny@4", "--json"]) == 0
    seen = []
    monkeypatch.setattr("sorted_ds.commands.prepare.run", lambda args: seen.extend(args.overrides) or 0)
    main(["prepare", str(trunk), "--branch", "runs/tiny@4"])
    run = load_run(trunk, seen)
    assert run.checkpoint.branch == f"{trunk.parent}/runs/tiny@4"


def test_the_rate_stays_at_its_peak_until_the_decay():
    optim = Optim(learning_rate=2.0, warmup_steps=4, decay="linear", decay_steps=10, final_fraction=0.0)
    rates = [lr_at(step, 100, optim) for step in range(100)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert set(rates[4:90]) == {2.0}
    assert rates[90:] == pytest.approx([2.0 * (1 - number / 10) for number in range(1, 11)])
    longer = [lr_at(step, 200, optim) for step in range(90)]
    assert longer == rates[:90], "what comes before the decay does not depend on the length of the run"


def test_a_decay_that_is_longer_than_the_run_begins_after_the_warm_up():
    long, default = (Optim(warmup_steps=4, decay_steps=steps) for steps in (1000, 0))
    assert [lr_at(step, 50, long) for step in range(50)] == [lr_at(step, 50, default) for step in range(50)]


def test_settings_that_contradict_each_other_are_refused(tmp_path, capsys):
    run = run_file(tmp_path)
    for overrides, message in (
        (["optim.decay=constant", "optim.decay_steps=5"], 'optim.decay_steps = 5, but optim.decay = "constant".'),
        (["checkpoint.keep_steps=[401]"], "checkpoint.keep_steps names step 401, but the run ends after 400."),
    ):
        assert main(["plan", str(run), *overrides]) == 2
        assert message in one_error(capsys.readouterr().err)


def test_a_damaged_origin_is_named(trunk, tmp_path, capsys):
    damaged = tmp_path / "runs"
    shutil.copytree(run_dir(trunk), damaged)
    (damaged / "checkpoints" / "step_00000004" / "rank_0000.safetensors").unlink()
    assert main(["plan", str(branch_of(trunk, "damaged")), f"checkpoint.branch={damaged}@4"]) == 2
    assert "rank_0000.safetensors is missing" in one_error(capsys.readouterr().err)
