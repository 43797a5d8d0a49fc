"""What ends a run early: signals, files and a deadline; and what a rank says that nothing was finished."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch

from sorted_ds.base.errors import AgreedError, UserError
from sorted_ds.cluster import ancestors, slurm, stop
from sorted_ds.cluster.ancestors import FIRST, Ancestors
from sorted_ds.cluster.launcher import free_port
from sorted_ds.cluster.ranks import SECONDS_TO_ASK, Ranks, _leave_start
from sorted_ds.cluster.stop import Stop, seconds_of
from sorted_ds.cluster.watchdog import EXIT_CODE
from sorted_ds.run.train import left_early


@pytest.fixture(autouse=True)
def no_signals():
    """None was seen, and handlers are as they were."""
    before = {number: signal.getsignal(number) for number in (*stop.LATER, *stop.FOR_GOOD)}
    stop._signals.clear()
    yield
    stop._signals.clear()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_time_limits_are_read_as_slurm_writes_them():
    assert [seconds_of(text) for text in ("90", "90:30", "1:30:00", "2-3", "1-12:30", "1-02:03:04")] == [
        *(5400, 5430, 5400, 2 * 86400 + 3 * 3600, 86400 + 45000, 86400 + 7384)
    ]
    for text in ("soon", "1h", "-5", "1:2:3:4", ""):
        with pytest.raises(UserError, match=r"train.time_limit = .* should be like 90 \(minutes\)"):
            seconds_of(text)


@pytest.mark.parametrize(
    ("number", "goes_on"), [(signal.SIGTERM, True), (signal.SIGUSR1, True), (signal.SIGINT, False)]
)
def test_a_signal_ends_the_run(tmp_path, number, goes_on):
    stop.listen()
    asked = Stop(tmp_path, "", is_first=False)
    assert asked.wanted(None) == asked.wanted(None) == (False, False, False)
    signal.raise_signal(number)
    assert asked.wanted(None) == (True, goes_on, not goes_on)
    assert asked.reason == number.name


def test_a_job_whose_time_is_too_short_for_a_step_is_not_started_again_for_ever(tmp_path):
    stop.listen()
    asked = Stop(tmp_path, "", is_first=False)
    signal.raise_signal(signal.SIGUSR1)
    assert asked.wanted(None) == (True, False, False)


@pytest.mark.parametrize(("name", "goes_on"), [("stop", False), ("requeue", True)])
def test_a_touched_file_ends_the_run_once_and_only_rank_0_looks(tmp_path, name, goes_on):
    first, other = (Stop(tmp_path, "", is_first) for is_first in (True, False))
    (tmp_path / name).touch()
    assert first.wanted(None) == (True, goes_on, not goes_on)
    assert other.wanted(None) == (False, False, False)
    other.heeded()
    assert (tmp_path / name).exists()
    first.heeded()
    assert first.wanted(None) == (False, False, False)


def test_a_file_that_is_touched_after_the_last_question_is_for_the_next_start(tmp_path):
    stop.listen()
    signal.raise_signal(signal.SIGUSR1)
    asked = Stop(tmp_path, "", is_first=True)
    asked.wanted(None)
    (tmp_path / "stop").touch()  # while it saves
    asked.heeded()
    assert (tmp_path / "stop").exists()
    asked.heeded(is_through=True)
    assert not (tmp_path / "stop").exists()


def test_stop_is_stronger_than_requeue(tmp_path):
    stop.listen()
    (tmp_path / "stop").touch()
    signal.raise_signal(signal.SIGTERM)
    assert Stop(tmp_path, "", is_first=True).wanted(None) == (True, True, True)


def test_the_deadline_leaves_time_for_the_longest_step_and_a_save(tmp_path):
    clock = mock.Mock(return_value=stop.STARTED + 10)
    with mock.patch.object(stop.time, "monotonic", clock):
        asked = Stop(tmp_path, "10", is_first=True)
        assert asked.wanted(None) == (False, False, False)
        clock.return_value += 100  # a step with an evaluation
        assert asked.wanted(None) == (False, False, False)
        clock.return_value = stop.STARTED + 600 - 2 * 100 - stop.SECONDS_TO_LEAVE + 1
        assert asked.wanted(None) == (True, True, False)
        assert asked.reason == "the time limit"


def test_what_is_passed_over_is_no_measure_of_what_comes_and_a_limit_that_passed_in_it_is_tried_again(tmp_path):
    clock = mock.Mock(return_value=stop.STARTED + 10)
    with mock.patch.object(stop.time, "monotonic", clock):
        asked = Stop(tmp_path, "10", is_first=True)
        asked.wanted(None)
        clock.return_value += 20  # a step
        asked.wanted(None)
        asked.pass_over()
        clock.return_value += 400  # the model is written
        assert asked.wanted(0.0) == (False, False, False)
        clock.return_value = stop.STARTED + 600 - 20 - stop.SECONDS_TO_LEAVE - 1
        asked.pass_over()
        assert asked.wanted(0.0) == (False, False, False)
        asked.pass_over()
        clock.return_value += 2
        assert asked.wanted(0.0) == (True, True, False)


def test_a_limit_that_is_over_before_the_first_step_is_not_tried_again_and_again(tmp_path):
    clock = mock.Mock(return_value=stop.STARTED + 61)
    with mock.patch.object(stop.time, "monotonic", clock):
        assert Stop(tmp_path, "1", is_first=True).wanted(None) == (True, False, False)


CHAIN = """
import os, subprocess, sys, time
generation, first, is_launched = sys.argv[1:]
if generation == "grandparent" and first == "sorted-ds":
    os.environ["SORTED_DS_FIRST_PROCESS"] = str(os.getpid())
if generation != "rank":
    younger = {"grandparent": "parent", "parent": "rank"}[generation]
    sys.exit(subprocess.call([sys.executable, "chain.py", younger, first, is_launched]))
from sorted_ds.cluster import ancestors
ancestors.SECONDS_BETWEEN_LOOKS = 0.05
watched = ancestors.Ancestors(os.environ, os.getppid(), is_launched == "True")
print("watching", watched.one_is_gone(), flush=True)
end = time.monotonic() + 4
while not watched.one_is_gone() and time.monotonic() < end:
    time.sleep(0.1)
print("still there" if time.monotonic() >= end else "gone", flush=True)
"""


@pytest.mark.parametrize(
    ("victim", "first", "is_launched", "told"),
    [
        ("parent", "script", True, "gone"),
        ("grandparent", "sorted-ds", True, "gone"),
        ("grandparent", "deepspeed", True, "gone"),
        ("grandparent", "script", True, "still there"),  # what a user starts it with may leave before it
        ("parent", "script", False, "still there"),
    ],
)
def test_a_rank_notices_that_a_process_that_started_it_is_gone(tmp_path, victim, first, is_launched, told):
    for name in (first, "chain.py"):
        (tmp_path / name).write_text(CHAIN)
    command = [sys.executable, first, "grandparent", first, str(is_launched)]
    grandparent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert grandparent.stdout.readline() == "watching False\n"
    parent = psutil.Process(grandparent.pid).children()[0]
    (parent if victim == "parent" else grandparent).kill()
    assert grandparent.stdout.readline() == f"{told}\n"
    grandparent.kill()


@pytest.mark.parametrize(
    ("command", "is_deepspeed"),
    [
        (["python", "/venv/bin/deepspeed", "--hostfile", "hosts", "train.py"], True),
        (["/venv/bin/deepspeed", "train.py"], True),
        (["python", "-u", "-m", "deepspeed.launcher.runner", "train.py"], True),
        (["python", "submit.py", "--with", "deepspeed"], False),
        (["vim", "notes/deepspeed.md"], False),
        ([], False),
    ],
)
def test_deepspeed_is_known_by_its_name(command, is_deepspeed):
    process = mock.Mock(**{"cmdline.return_value": command})
    assert ancestors._is_deepspeed(process) == is_deepspeed


def test_the_first_process_of_a_container_has_nobody_above_it():
    with mock.patch.object(ancestors, "_up_to", return_value=iter(())):
        assert not Ancestors({}, os.getppid(), is_launched=True).one_is_gone()


def test_a_first_process_that_was_gone_before_is_gone():
    with subprocess.Popen(["true"]) as first:
        first.wait()
    parent = os.getppid()
    assert Ancestors({FIRST: str(first.pid)}, parent, is_launched=False).one_is_gone()
    assert Ancestors({}, first.pid, is_launched=True).one_is_gone()  # it had another parent when it started
    assert not Ancestors({FIRST: str(parent)}, parent, is_launched=False).one_is_gone()
    assert not Ancestors({}, parent, is_launched=True).one_is_gone()


WAITING = """
import os, signal, sys, threading
from sorted_ds.cluster.stop import listen
listen()
if sys.argv[1] == "before":
    os.kill(os.getpid(), signal.SIGTERM)
from sorted_ds.cluster.ranks import joined_ranks
if sys.argv[1] != "never":
    threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM)).start()
with joined_ranks():
    print("lived")
"""
SCONTROL = """\
folder=$(dirname "$0")
if [ "$1" != show ]; then echo "$@" >> "$folder/asked"; exit; fi
echo >> "$folder/looks"
set -- {times}
[ "$(wc -l < "$folder/looks")" = 1 ] || shift $(($# - 1))
echo "   PreemptEligibleTime=2026-11-27T10:00:00 PreemptTime=$1"
"""
PREEMPTED, LATER = "2026-11-27T11:00:00", "None 2026-11-27T11:00:00"
JOB = {"SLURM_JOB_ID": "7", slurm.ASKED_FOR: "1"}


@pytest.fixture(params=[LATER])
def answers(tmp_path, request) -> Path:
    """Programs that answer as Slurm does of a job that is preempted, at the first look or later, or not."""
    programs = {"squeue": "echo RUNNING", "scontrol": SCONTROL.format(times=request.param)}
    for name, does in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def waiting_rank(moment: str, **environment: str) -> subprocess.CompletedProcess:
    """A rank that waits for another, which never comes, and gets a SIGTERM, or never."""
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    env = {**os.environ, **place, "MASTER_PORT": str(free_port()), **environment}
    command = [sys.executable, "-c", WAITING, moment]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("moment", ["before", "meanwhile"])
def test_sigterm_ends_at_once_while_ranks_wait_for_each_other(moment):
    done = waiting_rank(moment)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, "", "")


@pytest.mark.parametrize(
    ("moment", "answers"), [("before", LATER), ("meanwhile", LATER), ("never", PREEMPTED)], indirect=["answers"]
)
def test_a_job_that_is_preempted_while_ranks_wait_for_each_other_or_before_is_started_again(moment, answers):
    path = f"{answers}:{os.environ['PATH']}"
    done = waiting_rank(moment, **JOB, PATH=path)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == "preempted before the first step; Slurm starts job 7 again\n"
    assert (answers / "asked").read_text() == "requeue 7\n"


@pytest.mark.parametrize(("answers", "job"), [("None", JOB), (PREEMPTED, {"SLURM_JOB_ID": "7"})], indirect=["answers"])
def test_a_job_that_another_rank_failed_or_that_is_not_the_runs_own_is_not_started_again(answers, job):
    """A launcher signals rank 0 when another rank fails: it would fail again, for ever."""
    done = waiting_rank("meanwhile", **job, PATH=f"{answers}:{os.environ['PATH']}")
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "")
    assert not (answers / "asked").exists()


def test_another_rank_waits_for_rank_0_which_asks(answers, monkeypatch):
    seconds = []
    monkeypatch.setattr("sorted_ds.cluster.ranks.time.sleep", seconds.append)
    monkeypatch.setattr("sorted_ds.cluster.ranks.os._exit", sys.exit)
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(answers))
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        _leave_start(False, signal.SIGTERM)
    assert seconds == [SECONDS_TO_ASK]
    assert not (answers / "asked").exists()


def test_a_signal_during_the_imports_is_remembered():
    script = "import sorted_ds.cluster.stop as s; s.listen(); import os, signal; os.kill(os.getpid(), signal.SIGTERM)\n"
    script += "import torch; print(sorted(s._signals))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"[{int(signal.SIGTERM)}]"


HANGS = """
import sys, threading, time
from pathlib import Path
from sorted_ds.cluster.watchdog import Watchdog
def stuck_in_a_collective():
    threading.Event().wait()
with Watchdog(float(sys.argv[2]), Path(sys.argv[1]), 3) as dog:
    for _ in range(10):
        time.sleep(0.05); dog.beat()
    stuck_in_a_collective()
"""


def test_a_rank_that_finishes_nothing_writes_its_stack_and_leaves(tmp_path):
    start = time.monotonic()
    command = [sys.executable, "-c", HANGS, str(tmp_path / "a run"), str(0.3 / 60)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == EXIT_CODE
    assert time.monotonic() - start > 0.75, "it barked while something was finished"
    path = Path(tmp_path / "a run" / "stacks" / "rank_0003.txt")
    assert "in stuck_in_a_collective" in path.read_text()
    assert done.stderr.count("error (rank 3): nothing was finished for 0.005 minutes") == 1
    assert str(path) in done.stderr


def test_a_stack_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "stacks").touch()
    command = [sys.executable, "-c", HANGS, str(tmp_path), str(0.3 / 60)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == EXIT_CODE
    assert "Stacks are in nowhere (" in done.stderr
    assert "in stuck_in_a_collective" in done.stderr


def test_without_minutes_it_never_barks(tmp_path):
    script = HANGS.replace("threading.Event().wait()", "time.sleep(1)")
    command = [sys.executable, "-c", script, str(tmp_path), "0"]
    assert subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0


def test_outside_of_slurm_and_in_a_job_that_is_not_the_runs_own_nothing_is_asked():
    assert slurm.requeue({}) == slurm.requeue({"SLURM_JOB_ID": "7"}) == ""


def test_a_refusal_for_ever_is_not_asked_for_again():
    answers = [(True, "RUNNING"), (False, "Only batch jobs are accepted or processed for job 7")]
    with (
        mock.patch.object(slurm, "_run", side_effect=answers),
        pytest.raises(UserError, match="Only batch jobs"),
    ):
        slurm.requeue(JOB)


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([(True, "COMPLETING")], "Slurm is ending job 7 (COMPLETING), and knows whether it starts it again"),
        ([(False, "no answer"), (True, "")], "Slurm starts job 7 again"),
        ([(True, "RUNNING"), (False, "timed out"), (True, "RUNNING"), (True, "")], "Slurm starts job 7 again"),
    ],
)
def test_what_slurm_says_is_told(answers, told):
    with mock.patch.object(slurm, "_run", side_effect=answers), mock.patch.object(slurm, "SECONDS_BETWEEN", 0):
        assert slurm.requeue(JOB) == told


def test_a_job_that_is_not_started_again_is_an_error_that_tells_why_it_ended(tmp_path):
    stop.listen()
    signal.raise_signal(signal.SIGTERM)
    asked = Stop(tmp_path, "", is_first=True)
    assert asked.wanted(None) == (True, True, False)
    alone = Ranks(0, 1, 0, torch.device("cpu"))
    with (
        mock.patch.object(slurm, "_run", return_value=(False, "disabled")),
        mock.patch.object(slurm, "SECONDS_BETWEEN", 0),
        mock.patch.dict(os.environ, JOB),
        pytest.raises(AgreedError, match=r"SIGTERM; job 7 could not be started again: disabled\. Submit it again"),
    ):
        left_early(asked, True, alone)


def test_of_an_array_only_the_own_task_is_started_again():
    array = {**JOB, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    with mock.patch.object(slurm, "_run", return_value=(True, "RUNNING")) as asked:
        slurm.requeue(array)
    assert [call.args[-1] for call in asked.call_args_list][-1] == "7_3"
