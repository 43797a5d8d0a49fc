"""A rank that was killed is named also where the others would not notice, as with NCCL, and nobody ends them."""

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
from sorted_ds.cluster.neighbours import SECONDS_BETWEEN_LOOKS, Neighbours, card, names
from tests.forked import SECONDS, end_of, start_ranks
from tests.launched import SETTINGS, STAYING, copied, one_error

GO_ON = "or can no longer be reached. Start the run again to go on from its last checkpoint.\n"

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
        (0, [600, 600, 600]),  # nobody notices
        (0, [600, 0, 5]),  # rank 1 at once, when its collective raises, and rank 2 when it comes there
        (2, [0, 5, 600]),
    ],
)
def test_a_killed_rank_is_named_once_by_those_who_do_not_notice(whole, tmp_path, victim, seconds):
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


def test_a_rank_sees_those_of_its_host_and_hears_of_others(capfd):
    with subprocess.Popen(["sleep", "60"]) as other:
        machine = json.loads(card())[0]
        cards = [card(), json.dumps(["another machine", os.getpid()]), json.dumps([machine, other.pid])]
        store = dist.TCPStore("127.0.0.1", free_port(), is_master=True)
        with Neighbours(0, 3, store, is_rank_0s=True) as seen:
            seen.watch(cards)
            assert seen._watched == {2: psutil.Process(other.pid)}
            assert seen.lost() == []
            other.kill()
            other.wait()
            assert seen.lost() == [2]
        with Neighbours(1, 3, store, is_rank_0s=True) as elsewhere:  # on another host
            elsewhere._store = dist.PrefixStore(cards[0], store)
            assert elsewhere.missing() == [2]
            elsewhere.tell(names(elsewhere.lost(), 3))
            seen.tell(names(seen.lost(), 3))
    assert capfd.readouterr().err == f"error: rank 2 of 3 ended, {GO_ON}"


def test_a_rank_that_was_dead_before_the_first_look_is_told_too():
    with subprocess.Popen(["true"]) as other:
        other.wait()
    cards = [card(), json.dumps(["another machine", os.getpid()]), json.dumps([json.loads(card())[0], other.pid])]
    store = dist.TCPStore("127.0.0.1", free_port(), is_master=True)
    with Neighbours(0, 3, store, is_rank_0s=True) as seen:
        seen.watch(cards)
        assert seen.lost() == [2]
        assert dist.PrefixStore(cards[0], store).get("lost") == b"2 "


def test_rank_0_keeps_its_store_until_those_of_other_hosts_have_asked(capfd):
    store = dist.TCPStore("127.0.0.1", free_port(), is_master=True)
    cards = [json.dumps([machine, number]) for number, machine in enumerate("abc")]
    rank_0, rank_1 = (Neighbours(rank, 3, store, is_rank_0s=True) for rank in (0, 1))
    for rank in (rank_0, rank_1):
        rank._store = dist.PrefixStore(cards[0], rank._store)
        rank._lost, rank._seen = [2], 0.0
    waiting = threading.Thread(target=rank_0.tell, args=("rank 2 ended",))
    waiting.start()
    waiting.join(2 * SECONDS_BETWEEN_LOOKS + 1)
    assert waiting.is_alive()
    rank_1.tell("rank 2 ended")
    waiting.join(1)
    assert not waiting.is_alive()
    assert capfd.readouterr().err.count("error: ") == 1


def test_a_message_that_nobody_can_read_keeps_no_rank(monkeypatch):
    monkeypatch.setattr(sys, "stderr", open("/dev/full", "w"))  # noqa: SIM115, closing would raise
    with Neighbours(0, 1, dist.HashStore(), is_rank_0s=True) as alone:
        alone.tell("rank 1 ended")


@pytest.mark.parametrize(("is_rank_0s", "lost"), [(True, [0]), (False, [])])
def test_a_store_that_is_gone_tells_of_rank_0_where_it_was_its(is_rank_0s, lost, capfd):
    """torchrun keeps the store itself: without it the ranks are still there, and save."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    store = dist.TCPStore("127.0.0.1", int(server.stdout.readline()), is_master=False)
    with Neighbours(1, 3, store, is_rank_0s) as seen:
        assert seen.lost() == []
        server.kill()
        server.wait()
        assert seen.lost() == seen.missing() == lost
        seen.tell("it is gone")
    assert f"error: it is gone. {GO_ON.partition('. ')[2]}" in capfd.readouterr().err
