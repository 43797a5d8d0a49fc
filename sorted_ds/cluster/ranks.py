"""Lets the ranks of a run exchange a few facts without DeepSpeed: sums, texts, errors.

In: the environment that a launcher sets, and what each rank passes in. Out: `Ranks`, whose methods give every rank the
same result, inside of the process group that `joined_ranks` opens. Ranks exchange little: sums, a stop request, and
whether a rank has failed or is gone. Everything else (rows, samples, learning rate) is a pure function of (seed, step).
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import NoReturn

import torch
import torch.distributed as dist

from sorted_ds.base.errors import AgreedError, UserError
from sorted_ds.base.shuffle import keyed_number
from sorted_ds.cluster.neighbours import LOST_RANK_EXIT_CODE, Neighbours, describe_lost, describe_process
from sorted_ds.cluster.rendezvous import RankInfo, find_rank_info
from sorted_ds.cluster.slurm import is_preempted, requeuable_job, requeue
from sorted_ds.cluster.stop import REQUEUE_SIGNALS, SIGNAL_EXIT_CODE, leaving_on_signals

FACT_BOUND = 2**32
"""Facts are compared as numbers below this: in double precision the sum over a million ranks is exact."""
RENDEZVOUS_TIMEOUT = timedelta(minutes=10)
COLLECTIVE_TIMEOUT = timedelta(hours=1)
"""This is longer than `train.hang_minutes`, because the watchdog's message tells more than the timeout's."""
SECONDS_TO_REQUEUE = 60.0
"""How long a rank that must exit waits for rank 0 to ask Slurm for a requeue."""


@dataclass(frozen=True)
class Ranks:
    """This process among all ranks: it is rank `rank` of `size`, and computes on `device`.

    Every rank must call a method that exchanges something, in the same order: they are collectives.
    """

    rank: int
    size: int
    local_rank: int
    """The rank's number on its host."""
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Returns the sum of each value over all ranks, in double precision. Every rank passes as many values."""
        if self.size == 1:
            return [float(value) for value in values]
        total = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def sum_with_same_fact(self, values: Sequence[float], fact: str) -> list[float]:
        """Returns `sum(values)`, and checks in the same collective that every rank passes the same `fact`.

        Raises: AgreedError, on all ranks, when the facts differ.
        """
        number = keyed_number(FACT_BOUND, fact)
        *sums, total = self.sum([*values, number])
        if total != number * self.size:
            facts = dict.fromkeys(self.gather(fact))
            raise AgreedError(f"ranks disagree: {' / '.join(facts)}. Start all ranks with the same code and packages.")
        return sums

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """Raises on every rank what one rank raised inside of the block, so that no rank waits for a failed one.

        Raises: AgreedError, with the rank's number unless all ranks failed alike. A rank whose error is neither a
        UserError nor an OSError raises that error itself, with its traceback, because it is a defect.
        """
        message, defect = "", None
        try:
            yield
        except (UserError, OSError) as error:
            message = str(error) or repr(error)
        except Exception as error:
            message, defect = f"unexpected {error!r}; its traceback is above", error
        messages = self.gather(message)
        if defect is not None:
            raise defect
        for rank, failure in enumerate(messages):
            if failure:
                raise AgreedError(failure if set(messages) == {failure} else f"rank {rank}: {failure}")

    def ask_first(self, find: Callable[[], str]) -> str:
        """Returns what `find` returns on rank 0, which alone calls it. Every rank must call this.

        Raises: AgreedError, on all ranks, with the message of the UserError or OSError that `find` raises.
        """
        answer = {"found": "", "refusal": ""}
        with self.fail_together():  # for defects
            if self.is_first:
                try:
                    answer["found"] = find()
                except (UserError, OSError) as error:
                    answer["refusal"] = str(error) or repr(error)
        answer = json.loads(self.gather(json.dumps(answer))[0])
        if answer["refusal"]:
            raise AgreedError(answer["refusal"])
        return answer["found"]

    def require_same_facts(self, facts: Mapping[str, str]) -> None:
        """Raises: AgreedError, on all ranks, when the facts of a rank differ from rank 0's."""
        gathered = [json.loads(text) for text in self.gather(json.dumps(dict(facts)))]
        for rank, others in enumerate(gathered):
            for key in dict.fromkeys([*gathered[0], *others]):
                if gathered[0].get(key) != others.get(key):
                    raise AgreedError(
                        f"rank {rank} has {key} = {others.get(key)}, rank 0 has {gathered[0].get(key)}. Start all "
                        "ranks with the same run file, weights, DeepSpeed JSON, packages and code."
                    )

    def gather(self, text: str) -> list[str]:
        """Returns the text of every rank, in the order of ranks. It is sent as UTF-8: nothing is unpickled."""
        if self.size == 1:
            return [text]
        own = text.encode("utf-8", "surrogatepass")
        sizes = [int(size) for size in self._gather_tensors(torch.tensor([len(own)], device=self.device))]
        padded = torch.zeros(max(1, *sizes), dtype=torch.uint8)
        padded[: len(own)] = torch.frombuffer(bytearray(own + b"\0"), dtype=torch.uint8)[:-1]
        parts = self._gather_tensors(padded.to(self.device))
        found = [part.cpu().numpy().tobytes()[:size] for part, size in zip(parts, sizes, strict=True)]
        return [part.decode("utf-8", "surrogatepass") for part in found]

    def _gather_tensors(self, own: torch.Tensor) -> list[torch.Tensor]:
        """Returns the tensor of every rank. All have the same shape."""
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own)
        return found


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Opens the process group and yields this process's `Ranks`. Ranks that succeeded leave the group together.

    Raises: UserError when the ranks do not find each other; SystemExit when another rank has died.
    """
    info = find_rank_info(os.environ)
    device = _choose_device(info)
    store = _join(info, device)
    ranks = Ranks(info.rank, info.size, info.local_rank, device)
    with Neighbours(ranks.rank, ranks.size, store, _rank_0_keeps_store()) as neighbours:
        try:
            neighbours.watch(ranks.gather(describe_process()))
            yield ranks
            if ranks.size > 1:
                dist.barrier()
        except UserError:
            dist.destroy_process_group()
            raise
        except RuntimeError as error:
            if ranks.size == 1 or not _is_connection_lost(error):
                raise  # at once, with its traceback: with NCCL, leaving the group would first wait for the others
            dist.destroy_process_group()  # only now do the ranks that wait for this one notice
            _exit_after_lost_connection(neighbours, ranks, error)
    dist.destroy_process_group()


def _join(info: RankInfo, device: torch.device) -> dist.Store:
    """Joins the process group and returns the ranks' store. DeepSpeed reads the variables that this sets."""
    os.environ.update(RANK=str(info.rank), WORLD_SIZE=str(info.size), LOCAL_RANK=str(device.index or 0))
    if device.type == "cpu":
        os.environ["LOCAL_RANK"] = str(info.local_rank)
    # With this variable, DeepSpeed 0.19.8 allocates 62 MB of shared memory on CPU ranks, which only its inference uses,
    # and never frees it (ops/csrc/cpu/comm/shm_interface.cpp).
    os.environ.pop("LOCAL_SIZE", None)
    if info.size > 1:
        os.environ.update(MASTER_ADDR=info.address, MASTER_PORT=str(info.port))
    backend = "nccl" if device.type == "cuda" else "gloo"
    # Slurm signals only tasks, so no signal has come for a preemption while the batch script still prepared the data.
    if info.rank == 0 and is_preempted(os.environ):
        _requeue_and_exit()
    try:
        with leaving_on_signals(partial(_exit_before_first_step, info.rank == 0)):
            store = (
                next(dist.rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))[0] if info.size > 1 else dist.HashStore()
            )
            own = dist.PrefixStore("sorted_ds", store)
            dist.init_process_group(
                backend, rank=info.rank, world_size=info.size, store=own, timeout=COLLECTIVE_TIMEOUT
            )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {info.rank} of {info.size} did not find the other ranks at {info.address}:{info.port}: "
            f"{str(error).splitlines()[0]}. Check that all ranks were started, and that MASTER_ADDR and MASTER_PORT "
            "name rank 0's host and a free port of it."
        ) from None
    return store


def _exit_before_first_step(is_first: bool, number: int) -> NoReturn:
    """Ends this rank after signal `number`. If its Slurm job is being preempted, the job is requeued.

    Rank 0 asks Slurm, and the others wait for it, because the first rank that exits ends the job, which Slurm then
    counts as failed. A job that a launcher ends because another rank failed is not requeued: it would fail again.
    """
    if number in REQUEUE_SIGNALS and not is_first and requeuable_job(os.environ):
        time.sleep(SECONDS_TO_REQUEUE)
    elif number in REQUEUE_SIGNALS and is_first and is_preempted(os.environ):
        _requeue_and_exit()
    os._exit(SIGNAL_EXIT_CODE + number)


def _requeue_and_exit() -> NoReturn:
    """Requeues a preempted job that has done no step. For rank 0."""
    try:
        result = requeue(os.environ)
    except UserError as refused:
        result = str(refused)
    with suppress(OSError):
        print(f"preempted before the first step; {result}", file=sys.stderr, flush=True)
    os._exit(SIGNAL_EXIT_CODE + signal.SIGTERM)


def _rank_0_keeps_store() -> bool:
    """Whether the store is in rank 0's process. Otherwise it is in torchrun's (torch/distributed/rendezvous.py)."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _choose_device(info: RankInfo) -> torch.device:
    """Returns the GPU of this rank, or the CPU. If a launcher shows each rank one GPU alone, it is that one.

    Raises: UserError when a host has more ranks than GPUs.
    """
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    if num_gpus > 1 and info.local_rank >= num_gpus:
        raise UserError(
            f"rank {info.rank} is number {info.local_rank} (from 0) on its host, which shows {num_gpus} GPUs. Start "
            "one rank for each GPU."
        )
    device = torch.device("cuda", info.local_rank % num_gpus)
    torch.cuda.set_device(device)
    return device


def _is_connection_lost(error: RuntimeError) -> bool:
    """Whether gloo raised this because another rank is gone. NCCL may end the process after `COLLECTIVE_TIMEOUT`."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error) or "gloo::" in str(error)


def _exit_after_lost_connection(neighbours: Neighbours, ranks: Ranks, error: RuntimeError) -> NoReturn:
    """Raises: SystemExit, after one of the living ranks has named the dead ones on stderr."""
    lost = neighbours.missing()
    unexplained = f"the connection between ranks broke: {str(error).splitlines()[0]}"
    neighbours.report(describe_lost(lost, ranks.size) if lost else unexplained)
    raise SystemExit(LOST_RANK_EXIT_CODE)
