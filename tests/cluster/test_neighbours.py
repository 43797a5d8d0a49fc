"""A killed rank is named even if the others would not notice its death, as with NCCL, and no launcher ends them."""

import json
import os
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch.distributed as dist

from sorted_ds.cluster.launcher import free_port
from sorted_ds.cluster.neighbours import SECONDS_BETWEEN_LOOKS, Neighbours, describe_lost, describe_process
from tests.forked import SECONDS, end_of, start_ranks
from tests.launched import SETTINGS, STAYING, copied, one_error

RESUME = "Start the run again to resume from its last checkpoint.\n"

SERVER = """
import time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True)
print(store.port, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("victim", "seconds"),
    [
        (0, [600, 600, 600]),  # no rank notices
        (0, [600, 0, 5]),  # rank 1 notices at once by its collective, and rank 2 when it comes there
        (2, [0, 5, 600]),
    ],
)
def test_a_killed_rank_is_named_once_by_ranks_that_would_not_notice(whole, tmp_path, victim, seconds):
    run = copied(whole, tmp_path, keep_steps=0)
    (tmp_path / "script.py").write_text(STAYING)
    ranks, logs = start_ranks(tmp_path / "script.py", [json.dumps(seconds), str(run), *SETTINGS], num_ranks=3)
    end = time.monotonic() + SECONDS
    while not all("staying\n" in log.read_text() for log in logs):
        assert time.monotonic() < end
        time.sleep(0.1)
    ranks[victim].kill()
    codes = end_of(ranks, logs, seconds=30)
    assert f"error: rank {victim} of 3 ended" in one_error("".join(log.read_text() for log in logs))
    assert codes == [-9 if rank == victim else 1 for rank in range(3)]


def test_a_rank_sees_deaths_on_its_host_and_reads_about_others_in_the_store(capfd):
    with subprocess.Popen(["sleep", "60"]) as other:
        machine = json.loads(describe_process())[0]
        processes = [describe_process(), json.dumps(["another machine", os.getpid()]), json.dumps([machine, other.pid])]
        store = dist.TCPStore("127.0.0.1", free_port(), is_master=True)
        with Neighbours(0, 3, store, rank_0_keeps_store=True) as seen:
            seen.watch(processes)
            assert seen._watched == {2: psutil.Process(other.pid)}
            assert seen.lost() == []
            other.kill()
            other.wait()
            assert seen.lost() == [2]
        with Neighbours(1, 3, store, rank_0_keeps_store=True) as elsewhere:  # on another host
            elsewhere._store = dist.PrefixStore(processes[0], store)
            assert elsewhere.missing() == [2]
            elsewhere.report(describe_lost(elsewhere.lost(), 3))
            seen.report(describe_lost(seen.lost(), 3))
    assert capfd.readouterr().err == f"error: rank 2 of 3 ended or cannot be reached. {RESUME}"


def test_a_rank_that_was_dead_before_the_first_look_is_lost_too():
    with subprocess.Popen(["true"]) as other:
        other.wait()
    processes = [
        describe_process(),
        json.dumps(["another machine", os.getpid()]),
        json.dumps([json.loads(describe_process())[0], other.pid]),
    ]
    store = dist.TCPStore("127.0.0.1", free_port(), is_master=True)
    with Neighbours(0, 3, store, rank_0_keeps_store=True) as seen:
        seen.watch(processes)
        assert seen.lost() == [2]
        assert dist.PrefixStore(processes[0], store).get("lost") == b"2 "


def test_rank_0_keeps_its_store_until_the_ranks_of_other_hosts_have_reported(capfd):
    store = dist.TCPStore("127.0.0.1", free_port(), is_master=True)
    processes = [json.dumps([machine, number]) for number, machine in enumerate("abc")]
    rank_0, rank_1 = (Neighbours(rank, 3, store, rank_0_keeps_store=True) for rank in (0, 1))
    for rank in (rank_0, rank_1):
        rank._store = dist.PrefixStore(processes[0], rank._store)
        rank._lost, rank._first_loss_time = [2], 0.0
    waiting = threading.Thread(target=rank_0.report, args=("rank 2 ended",))
    waiting.start()
    waiting.join(2 * SECONDS_BETWEEN_LOOKS + 1)
    assert waiting.is_alive()
    rank_1.report("rank 2 ended")
    waiting.join(1)
    assert not waiting.is_alive()
    assert capfd.readouterr().err.count("error: ") == 1


def test_a_rank_ends_even_if_its_message_cannot_be_written(monkeypatch):
    monkeypatch.setattr(sys, "stderr", open("/dev/full", "w"))  # noqa: SIM115, closing would raise
    with Neighbours(0, 1, dist.HashStore(), rank_0_keeps_store=True) as alone:
        alone.report("rank 1 ended")


@pytest.mark.parametrize(("rank_0_keeps_store", "lost"), [(True, [0]), (False, [])])
def test_a_lost_store_means_that_rank_0_is_lost_if_rank_0_kept_it(rank_0_keeps_store, lost, capfd):
    """torchrun keeps the store in its own process: when that is lost, the ranks are still there and save."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    store = dist.TCPStore("127.0.0.1", int(server.stdout.readline()), is_master=False)
    with Neighbours(1, 3, store, rank_0_keeps_store) as seen:
        assert seen.lost() == []
        server.kill()
        server.wait()
        assert seen.lost() == seen.missing() == lost
        seen.report("it is gone")
    assert f"error: it is gone. {RESUME}" in capfd.readouterr().err
