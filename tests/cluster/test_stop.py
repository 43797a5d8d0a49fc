"""Signals, files and a deadline stop a run early; a rank without progress writes its stacks and exits."""

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
from sorted_ds.cluster.ancestors import FIRST_PID_VARIABLE, Ancestors
from sorted_ds.cluster.launcher import free_port
from sorted_ds.cluster.ranks import SECONDS_TO_REQUEUE, Ranks, _exit_before_first_step
from sorted_ds.cluster.stop import StopCauses, time_limit_seconds
from sorted_ds.cluster.watchdog import HANG_EXIT_CODE
from sorted_ds.run.finish import end_early


@pytest.fixture(autouse=True)
def no_signals():
    """Clears the recorded signals, and restores the signal handlers afterwards."""
    before = {number: signal.getsignal(number) for number in (*stop.REQUEUE_SIGNALS, *stop.FINAL_SIGNALS)}
    stop._received_signals.clear()
    yield
    stop._received_signals.clear()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_time_limits_are_read_in_the_notation_of_slurm():
    assert [time_limit_seconds(text) for text in ("90", "90:30", "1:30:00", "2-3", "1-12:30", "1-02:03:04")] == [
        *(5400, 5430, 5400, 2 * 86400 + 3 * 3600, 86400 + 45000, 86400 + 7384)
    ]
    for text in ("soon", "1h", "-5", "1:2:3:4", ""):
        with pytest.raises(UserError, match=r"train.time_limit = .* should be like 90 \(minutes\)"):
            time_limit_seconds(text)


@pytest.mark.parametrize(
    ("number", "requeues"), [(signal.SIGTERM, True), (signal.SIGUSR1, True), (signal.SIGINT, False)]
)
def test_a_signal_stops_the_run(tmp_path, number, requeues):
    stop.listen()
    causes = StopCauses(tmp_path, "", is_first=False)
    assert causes.request(None) == causes.request(None) == (False, False, False)
    signal.raise_signal(number)
    assert causes.request(None) == (True, requeues, not requeues)
    assert causes.reason == number.name


def test_a_job_whose_time_is_too_short_for_a_step_is_not_requeued(tmp_path):
    stop.listen()
    causes = StopCauses(tmp_path, "", is_first=False)
    signal.raise_signal(signal.SIGUSR1)
    assert causes.request(None) == (True, False, False)


@pytest.mark.parametrize(("name", "requeues"), [("stop", False), ("requeue", True)])
def test_a_touched_file_stops_the_run_once_and_only_rank_0_looks_for_it(tmp_path, name, requeues):
    first, other = (StopCauses(tmp_path, "", is_first) for is_first in (True, False))
    (tmp_path / name).touch()
    assert first.request(None) == (True, requeues, not requeues)
    assert other.request(None) == (False, False, False)
    other.acknowledge()
    assert (tmp_path / name).exists()
    first.acknowledge()
    assert first.request(None) == (False, False, False)


def test_a_file_that_is_touched_after_the_last_request_stays_for_the_next_start(tmp_path):
    stop.listen()
    signal.raise_signal(signal.SIGUSR1)
    causes = StopCauses(tmp_path, "", is_first=True)
    causes.request(None)
    (tmp_path / "stop").touch()  # while it saves
    causes.acknowledge()
    assert (tmp_path / "stop").exists()
    causes.acknowledge(is_finished=True)
    assert not (tmp_path / "stop").exists()


def test_the_file_stop_forbids_a_requeue_that_a_signal_asks_for(tmp_path):
    stop.listen()
    (tmp_path / "stop").touch()
    signal.raise_signal(signal.SIGTERM)
    assert StopCauses(tmp_path, "", is_first=True).request(None) == (True, True, True)


def test_the_deadline_leaves_time_for_the_longest_step_and_a_save(tmp_path):
    clock = mock.Mock(return_value=stop.START_TIME + 10)
    with mock.patch.object(stop.time, "monotonic", clock):
        causes = StopCauses(tmp_path, "10", is_first=True)
        assert causes.request(None) == (False, False, False)
        clock.return_value += 100  # a step with an evaluation
        assert causes.request(None) == (False, False, False)
        clock.return_value = stop.START_TIME + 600 - 2 * 100 - stop.SECONDS_TO_EXIT + 1
        assert causes.request(None) == (True, True, False)
        assert causes.reason == "the time limit"


def test_a_skipped_interval_does_not_count_in_the_forecast_of_the_deadline(tmp_path):
    clock = mock.Mock(return_value=stop.START_TIME + 10)
    with mock.patch.object(stop.time, "monotonic", clock):
        causes = StopCauses(tmp_path, "10", is_first=True)
        causes.request(None)
        clock.return_value += 20  # a step
        causes.request(None)
        causes.skip_interval()
        clock.return_value += 400  # the model is written
        assert causes.request(0.0) == (False, False, False)
        clock.return_value = stop.START_TIME + 600 - 20 - stop.SECONDS_TO_EXIT - 1
        causes.skip_interval()
        assert causes.request(0.0) == (False, False, False)
        causes.skip_interval()
        clock.return_value += 2
        assert causes.request(0.0) == (True, True, False)


def test_a_limit_that_ends_before_the_first_step_does_not_requeue_the_job(tmp_path):
    clock = mock.Mock(return_value=stop.START_TIME + 61)
    with mock.patch.object(stop.time, "monotonic", clock):
        assert StopCauses(tmp_path, "1", is_first=True).request(None) == (True, False, False)


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
print("watching", watched.has_one_ended(), flush=True)
end = time.monotonic() + 4
while not watched.has_one_ended() and time.monotonic() < end:
    time.sleep(0.1)
print("still there" if time.monotonic() >= end else "gone", flush=True)
"""


@pytest.mark.parametrize(
    ("victim", "first", "is_launched", "printed"),
    [
        ("parent", "script", True, "gone"),
        ("grandparent", "sorted-ds", True, "gone"),
        ("grandparent", "deepspeed", True, "gone"),
        ("grandparent", "script", True, "still there"),  # a user's own script may end before the launcher
        ("parent", "script", False, "still there"),
    ],
)
def test_a_rank_notices_the_end_of_a_process_that_started_it(tmp_path, victim, first, is_launched, printed):
    for name in (first, "chain.py"):
        (tmp_path / name).write_text(CHAIN)
    command = [sys.executable, first, "grandparent", first, str(is_launched)]
    grandparent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert grandparent.stdout.readline() == "watching False\n"
    parent = psutil.Process(grandparent.pid).children()[0]
    (parent if victim == "parent" else grandparent).kill()
    assert grandparent.stdout.readline() == f"{printed}\n"
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
def test_the_deepspeed_launcher_is_recognised_by_its_command_line(command, is_deepspeed):
    process = mock.Mock(**{"cmdline.return_value": command})
    assert ancestors._is_deepspeed_launcher(process) == is_deepspeed


def test_the_first_process_of_a_container_has_no_ancestors_to_watch():
    with mock.patch.object(ancestors, "_ancestors_up_to", return_value=iter(())):
        assert not Ancestors({}, os.getppid(), is_launched=True).has_one_ended()


def test_an_ancestor_that_ended_before_the_first_look_has_ended():
    with subprocess.Popen(["true"]) as first:
        first.wait()
    parent = os.getppid()
    assert Ancestors({FIRST_PID_VARIABLE: str(first.pid)}, parent, is_launched=False).has_one_ended()
    assert Ancestors({}, first.pid, is_launched=True).has_one_ended()  # its parent was another process when it started
    assert not Ancestors({FIRST_PID_VARIABLE: str(parent)}, parent, is_launched=False).has_one_ended()
    assert not Ancestors({}, parent, is_launched=True).has_one_ended()


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
    print("joined")
"""
SCONTROL = """\
folder=$(dirname "$0")
if [ "$1" != show ]; then echo "$@" >> "$folder/requests"; exit; fi
echo >> "$folder/looks"
set -- {times}
[ "$(wc -l < "$folder/looks")" = 1 ] || shift $(($# - 1))
echo "   PreemptEligibleTime=2026-11-27T10:00:00 PreemptTime=$1"
"""
PREEMPTED, PREEMPTED_LATER = "2026-11-27T11:00:00", "None 2026-11-27T11:00:00"
JOB = {"SLURM_JOB_ID": "7", slurm.REQUEUE_VARIABLE: "1"}


@pytest.fixture(params=[PREEMPTED_LATER])
def answers(tmp_path, request) -> Path:
    """Makes programs that answer as Slurm does for a job that is preempted at the first look, later, or never."""
    programs = {"squeue": "echo RUNNING", "scontrol": SCONTROL.format(times=request.param)}
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def waiting_rank(moment: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a rank that waits for another one, which never comes. `moment`: when the rank gets a SIGTERM."""
    rank = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    env = {**os.environ, **rank, "MASTER_PORT": str(free_port()), **environment}
    command = [sys.executable, "-c", WAITING, moment]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("moment", ["before", "meanwhile"])
def test_sigterm_ends_a_rank_at_once_while_it_waits_for_other_ranks(moment):
    done = waiting_rank(moment)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, "", "")


@pytest.mark.parametrize(
    ("moment", "answers"),
    [("before", PREEMPTED_LATER), ("meanwhile", PREEMPTED_LATER), ("never", PREEMPTED)],
    indirect=["answers"],
)
def test_a_job_that_is_preempted_before_its_ranks_have_met_is_requeued(moment, answers):
    path = f"{answers}:{os.environ['PATH']}"
    done = waiting_rank(moment, **JOB, PATH=path)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == "preempted before the first step; Slurm starts job 7 again\n"
    assert (answers / "requests").read_text() == "requeue 7\n"


@pytest.mark.parametrize(("answers", "job"), [("None", JOB), (PREEMPTED, {"SLURM_JOB_ID": "7"})], indirect=["answers"])
def test_a_job_that_is_not_preempted_or_not_marked_for_requeue_is_not_requeued(answers, job):
    """A launcher signals rank 0 also when another rank fails. A requeued job would fail again each time."""
    done = waiting_rank("meanwhile", **job, PATH=f"{answers}:{os.environ['PATH']}")
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "")
    assert not (answers / "requests").exists()


def test_other_ranks_wait_while_rank_0_asks_slurm(answers, monkeypatch):
    seconds = []
    monkeypatch.setattr("sorted_ds.cluster.ranks.time.sleep", seconds.append)
    monkeypatch.setattr("sorted_ds.cluster.ranks.os._exit", sys.exit)
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(answers))
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        _exit_before_first_step(False, signal.SIGTERM)
    assert seconds == [SECONDS_TO_REQUEUE]
    assert not (answers / "requests").exists()


def test_a_signal_during_the_imports_is_recorded():
    script = "import sorted_ds.cluster.stop as s; s.listen(); import os, signal; os.kill(os.getpid(), signal.SIGTERM)\n"
    script += "import torch; print(sorted(s._received_signals))"
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
        time.sleep(0.05); dog.heartbeat()
    stuck_in_a_collective()
"""


def test_a_rank_without_progress_writes_its_stacks_and_exits(tmp_path):
    start = time.monotonic()
    command = [sys.executable, "-c", HANGS, str(tmp_path / "a run"), str(0.3 / 60)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == HANG_EXIT_CODE
    assert time.monotonic() - start > 0.75, "the watchdog ended a rank that made progress"
    path = Path(tmp_path / "a run" / "stacks" / "rank_0003.txt")
    assert "in stuck_in_a_collective" in path.read_text()
    assert done.stderr.count("error (rank 3): no progress for 0.005 minutes") == 1
    assert str(path) in done.stderr


def test_stacks_that_cannot_be_written_to_a_file_are_printed(tmp_path):
    (tmp_path / "stacks").touch()
    command = [sys.executable, "-c", HANGS, str(tmp_path), str(0.3 / 60)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == HANG_EXIT_CODE
    assert "The stacks of all threads follow, because they could not be written to a file (" in done.stderr
    assert "in stuck_in_a_collective" in done.stderr


def test_with_zero_minutes_the_watchdog_does_nothing(tmp_path):
    script = HANGS.replace("threading.Event().wait()", "time.sleep(1)")
    command = [sys.executable, "-c", script, str(tmp_path), "0"]
    assert subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0


def test_nothing_is_requeued_outside_of_slurm_or_in_a_job_that_is_not_marked():
    assert slurm.requeue({}) == slurm.requeue({"SLURM_JOB_ID": "7"}) == ""


def test_a_final_refusal_is_not_asked_again():
    answers = [(True, "RUNNING"), (False, "Only batch jobs are accepted or processed for job 7")]
    with (
        mock.patch.object(slurm, "_run", side_effect=answers),
        pytest.raises(UserError, match="Only batch jobs"),
    ):
        slurm.requeue(JOB)


@pytest.mark.parametrize(
    ("answers", "result"),
    [
        ([(True, "COMPLETING")], "Slurm is already ending job 7 (COMPLETING) and decides whether to start it again"),
        ([(False, "no answer"), (True, "")], "Slurm starts job 7 again"),
        ([(True, "RUNNING"), (False, "timed out"), (True, "RUNNING"), (True, "")], "Slurm starts job 7 again"),
    ],
)
def test_the_result_of_a_requeue_is_a_sentence(answers, result):
    with mock.patch.object(slurm, "_run", side_effect=answers), mock.patch.object(slurm, "SECONDS_BETWEEN_TRIES", 0):
        assert slurm.requeue(JOB) == result


def test_a_job_that_cannot_be_requeued_is_an_error_that_says_why_it_stopped(tmp_path):
    stop.listen()
    signal.raise_signal(signal.SIGTERM)
    causes = StopCauses(tmp_path, "", is_first=True)
    assert causes.request(None) == (True, True, False)
    alone = Ranks(0, 1, 0, torch.device("cpu"))
    with (
        mock.patch.object(slurm, "_run", return_value=(False, "disabled")),
        mock.patch.object(slurm, "SECONDS_BETWEEN_TRIES", 0),
        mock.patch.dict(os.environ, JOB),
        pytest.raises(AgreedError, match=r"SIGTERM; Slurm did not requeue job 7: disabled\. Submit it again"),
    ):
        end_early(causes, True, alone)


def test_only_the_own_task_of_an_array_is_requeued():
    array = {**JOB, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    with mock.patch.object(slurm, "_run", return_value=(True, "RUNNING")) as run:
        slurm.requeue(array)
    assert [call.args[-1] for call in run.call_args_list][-1] == "7_3"
