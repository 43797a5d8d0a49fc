"""What ranks say to each other outside of DeepSpeed.

May be imported by every stage. Ranks agree on few things: sums, a stop, and whether one of them failed or is gone.
Everything else (rows, samples, learning rate) is a pure function of (seed, step) and needs no word.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import NoReturn

import torch
import torch.distributed as dist

from sorted_ds.base.errors import AgreedError, UserError
from sorted_ds.base.shuffle import keyed_number
from sorted_ds.cluster.neighbours import EXIT_CODE, Neighbours, card, names
from sorted_ds.cluster.rendezvous import Place, find_place
from sorted_ds.cluster.slurm import is_preempted, job_of, requeue
from sorted_ds.cluster.stop import LATER, SIGNALLED, nothing_to_save

LARGEST_FACT = 2**32
"""Sums of a million ranks' numbers below this are exact in double precision."""
TO_MEET = timedelta(minutes=10)
TO_ANSWER = timedelta(hours=1)
"""How long a collective may wait. Longer than `train.hang_minutes`, whose end tells more."""

SECONDS_TO_ASK = 60.0
"""How long a rank that is to end waits for rank 0, which asks Slurm."""


@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `size`, computing on `device`."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over all ranks, in double precision. A collective: every rank calls it with as many values."""
        if self.size == 1:
            return [float(value) for value in values]
        total = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def sum_agreed(self, values: Sequence[float], fact: str) -> list[float]:
        """`sum`, and in the same collective whether all ranks have the same `fact`, which must be so.

        Raises: AgreedError, on all ranks, when they have not.
        """
        number = keyed_number(LARGEST_FACT, fact)
        *sums, total = self.sum([*values, number])
        if total != number * self.size:
            facts = dict.fromkeys(self.gather(fact))
            raise AgreedError(f"ranks disagree: {' / '.join(facts)}. Start all ranks with the same code and packages.")
        return sums

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raises on every rank what one rank raised, so that none waits for another.

        Raises: AgreedError, with the rank's number where not all failed alike. A rank whose error is neither a
        UserError nor an OSError raises its own, with its traceback: that is a defect.
        """
        message, defect = "", None
        try:
            yield
        except (UserError, OSError) as error:
            message = str(error) or repr(error)
        except Exception as error:
            message, defect = f"unexpected {error!r}; its traceback is above", error
        told = self.gather(message)
        if defect is not None:
            raise defect
        for rank, failed in enumerate(told):
            if failed:
                raise AgreedError(failed if set(told) == {failed} else f"rank {rank}: {failed}")

    def agree(self, facts: Mapping[str, str]) -> None:
        """Raises: AgreedError, on all ranks, when one rank's facts differ from rank 0's. A collective."""
        told = [json.loads(text) for text in self.gather(json.dumps(dict(facts)))]
        for rank, others in enumerate(told):
            for key in dict.fromkeys([*told[0], *others]):
                if told[0].get(key) != others.get(key):
                    raise AgreedError(
                        f"rank {rank} has {key} = {others.get(key)}, rank 0 has {told[0].get(key)}. Start all ranks "
                        "with the same run file, weights, DeepSpeed JSON, packages and code."
                    )

    def gather(self, text: str) -> list[str]:
        """Every rank's text, in the order of ranks. A collective."""
        texts = [text] * self.size
        if self.size > 1:
            dist.all_gather_object(texts, text)
        return texts


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The process group for as long as it is needed. Ranks that all succeeded leave together.

    Raises: SystemExit when others ended.
    """
    place = find_place(os.environ)
    device = _device(place)
    store = _join(place, device)
    ranks = Ranks(place.rank, place.size, place.local_rank, device)
    with Neighbours(ranks.rank, ranks.size, store, _is_rank_0s_store()) as neighbours:
        try:
            neighbours.watch(ranks.gather(card()))
            yield ranks
            if ranks.size > 1:
                dist.barrier()
        except UserError:
            dist.destroy_process_group()
            raise
        except RuntimeError as error:
            if ranks.size == 1 or not _is_connection_lost(error):
                raise  # with NCCL, to leave the group would wait for the other ranks: the traceback comes first
            dist.destroy_process_group()  # now those that wait for this rank hear of it
            leave(neighbours, ranks, error)
    dist.destroy_process_group()


def _join(place: Place, device: torch.device) -> dist.Store:
    """Joins the process group. DeepSpeed reads the same numbers from the environment."""
    os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.size), LOCAL_RANK=str(device.index or 0))
    if device.type == "cpu":
        os.environ["LOCAL_RANK"] = str(place.local_rank)
    # By this variable DeepSpeed 0.19.8 makes 62 MB of shared memory on CPU ranks, which only its inference uses, and
    # never frees it (ops/csrc/cpu/comm/shm_interface.cpp).
    os.environ.pop("LOCAL_SIZE", None)
    if place.size > 1:
        os.environ.update(MASTER_ADDR=place.address, MASTER_PORT=str(place.port))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if place.rank == 0 and is_preempted(os.environ):  # while the script made ready, and there was no task to signal
        _start_again()
    try:
        with nothing_to_save(partial(_leave_start, place.rank == 0)):
            store = next(dist.rendezvous("env://", timeout=TO_MEET))[0] if place.size > 1 else dist.HashStore()
            own = dist.PrefixStore("sorted_ds", store)
            dist.init_process_group(backend, rank=place.rank, world_size=place.size, store=own, timeout=TO_ANSWER)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {place.rank} of {place.size} did not find the others by {place.address}:{place.port}: "
            f"{str(error).splitlines()[0]}. See that all ranks were started, and that MASTER_ADDR and MASTER_PORT name "
            "rank 0's host and a free port of it."
        ) from None
    return store


def _leave_start(is_first: bool, number: int) -> NoReturn:
    """Ends this rank by a signal. A Slurm job that is preempted is started again: rank 0 asks for it, and the others
    wait, because the first one that leaves ends the job, which Slurm takes for a failed one. One that a launcher ends
    because another rank failed is not: it would fail again.
    """
    if number in LATER and not is_first and job_of(os.environ):
        time.sleep(SECONDS_TO_ASK)
    elif number in LATER and is_first and is_preempted(os.environ):
        _start_again()
    os._exit(SIGNALLED + number)


def _start_again() -> NoReturn:
    """Rank 0 of a preempted job that has done no step."""
    try:
        then = requeue(os.environ)
    except UserError as refused:
        then = str(refused)
    with suppress(OSError):
        print(f"preempted before the first step; {then}", file=sys.stderr, flush=True)
    os._exit(SIGNALLED + signal.SIGTERM)


def _is_rank_0s_store() -> bool:
    """Rank 0 keeps it, or torchrun does (torch/distributed/rendezvous.py)."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _device(place: Place) -> torch.device:
    """The GPU of this rank. Where a launcher shows each rank one GPU alone, that one.

    Raises: UserError when a host has more ranks than GPUs.
    """
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    if num_gpus > 1 and place.local_rank >= num_gpus:
        raise UserError(
            f"rank {place.rank} is number {place.local_rank} on its host, which shows {num_gpus} GPUs. Start one rank "
            "for each GPU."
        )
    device = torch.device("cuda", place.local_rank % num_gpus)
    torch.cuda.set_device(device)
    return device


def _is_connection_lost(error: RuntimeError) -> bool:
    """What gloo raises when a peer is gone. With NCCL a rank may be ended by torch instead, after `TO_ANSWER`."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error) or "gloo::" in str(error)


def leave(neighbours: Neighbours, ranks: Ranks, error: RuntimeError) -> NoReturn:
    """When a collective broke. Raises: SystemExit, after one of those that are left has named the others."""
    lost = neighbours.missing()
    broke = f"the connection between ranks broke: {str(error).splitlines()[0]}"
    neighbours.tell(names(lost, ranks.size) if lost else broke)
    raise SystemExit(EXIT_CODE)
