"""Curves: what a resumed run keeps of them, and what a full disk costs."""

import json
import resource
import sys

import pytest
import torch

from sorted_ds.cluster.ranks import Ranks
from sorted_ds.run import monitor as monitor_module
from sorted_ds.run.monitor import LossSums, Monitor, PassLoss, Trained
from sorted_ds.run.run_file import load_run
from sorted_ds.space import Pass, SubNetSpace
from tests.runs import run_file

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
SPACE = SubNetSpace.of(["d1-g1-f32", "d3-g2-f64"])


def monitor(run, first_step: int = 0) -> Monitor:
    made = Monitor(run, SPACE, first_step, ALONE)
    made._last_report = 0.0
    return made


def report(made: Monitor, step: int) -> None:
    made.report_training(step, {SPACE.full: Trained(nll=30.0 * step, num_targets=10, num_visits=4)}, 1e-3, 0.5, 0.0)


def steps(run) -> list[int]:
    return [json.loads(line)["step"] for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    run = load_run(run_file(tmp_path))
    with monitor(run) as made:
        for step in (1, 2, 3):
            report(made, step)
    (run.run_dir / "metrics.jsonl").open("a").write('{"step": 4, "loss/tr')
    with monitor(run, first_step=2) as made:
        report(made, 5)
    assert steps(run) == [1, 2, 5]


@pytest.mark.parametrize("damage", [b"null", b"[1]", b"\xff\xfe", b"{}", b'{"step": "3"}', b"[" * 100_000], ids=repr)
def test_a_damaged_file_is_set_aside_and_named_and_its_good_rows_are_kept(tmp_path, capfd, damage):
    run = load_run(run_file(tmp_path))
    with monitor(run) as made:
        report(made, 1)
        report(made, 2)
    path = run.run_dir / "metrics.jsonl"
    first, second = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, damage, second, b""]))
    before = path.read_bytes()
    with monitor(run, first_step=2) as made:
        report(made, 3)
        assert not made.has_evaluated(3)
    assert steps(run) == [1, 2, 3]
    kept = run.run_dir / "metrics.jsonl.damaged1"
    assert kept.read_bytes() == before
    assert f"It was renamed to {kept}." in capfd.readouterr().err


def test_curves_that_cannot_be_opened_are_set_aside(tmp_path, capfd):
    run = load_run(run_file(tmp_path))
    (run.run_dir / "metrics.jsonl").mkdir(parents=True)
    (run.run_dir / "tensorboard").write_text("no folder")
    with monitor(run) as made:
        report(made, 1)
    assert steps(run) == [1]
    assert list((run.run_dir / "tensorboard").iterdir())
    said = capfd.readouterr().err
    assert (run.run_dir / "metrics.jsonl.damaged1").is_dir()
    assert (run.run_dir / "tensorboard.damaged1").read_text() == "no folder"
    assert all(f"renamed to {run.run_dir / name}.damaged1" in said for name in ("metrics.jsonl", "tensorboard"))


def test_a_disk_that_takes_no_curves_does_not_end_the_run(tmp_path, capfd, monkeypatch):
    run = load_run(run_file(tmp_path))

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(monitor_module, "_open_without_later_steps", refuse)
    monkeypatch.setattr(monitor_module, "SummaryWriter", refuse)
    with monitor(run) as made:
        report(made, 1)
    assert capfd.readouterr().err.count("cannot be written (No space left on device)") == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own writer
def test_a_full_disk_costs_the_curves_and_not_the_run(tmp_path, capfd):
    run = load_run(run_file(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monitor(run) as made:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        try:
            for step in range(1, 200):
                report(made, step)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "could not be written: [Errno 27] File too large" in capfd.readouterr().err


def test_a_table_that_nobody_can_read_costs_nothing(tmp_path, monkeypatch):
    with monitor(load_run(run_file(tmp_path))) as made:
        monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115, closing would raise
        made.print_table([], {"unigram model": 5.0})


def test_losses_are_summed_by_sub_network_and_start_anew():
    sums = LossSums(SPACE, torch.device("cpu"))
    small, full = SPACE
    losses = [(small, 2.0, 4), (full, 3.0, 4), (small, 1.0, 0)]
    sums.add([PassLoss(Pass(subnet), torch.tensor(nll), num) for subnet, nll, num in losses], 0.25)
    assert sums.take(ALONE) == {small: Trained(3.0, 4.0, 0.5), full: Trained(3.0, 4.0, 0.25)}
    assert sums.take(ALONE) == {}


def test_losses_are_means_over_targets(tmp_path):
    run = load_run(run_file(tmp_path))
    with monitor(run) as made:
        report(made, 2)
    row = json.loads((run.run_dir / "metrics.jsonl").read_text())
    assert row["loss/training"] == pytest.approx(6.0)
    assert row["subnets_training_loss/d3-g2-f64"] == pytest.approx(6.0)
    assert row["subnets_visits/d3-g2-f64"] == 4
