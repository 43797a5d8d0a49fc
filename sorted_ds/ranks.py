"""Which rank this process is, and what ranks say to each other outside of DeepSpeed.

May be imported by every stage. Ranks agree on few things: sums, a stop, and whether one of them failed. Everything
else (rows, draws, learning rate) is a pure function of (seed, step) and needs no word.
"""

import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sorted_ds.errors import AgreedError, UserError
from sorted_ds.shuffle import keyed_number

LARGEST_FACT = 2**32
"""Sums of a million ranks' numbers below this are exact in double precision."""
LAUNCHERS = {
    "deepspeed or torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "Slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}
"""Environment variables that name rank, number of ranks and rank on this machine, by who sets them."""


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
    """The process group for as long as it is needed. Ranks that all succeeded leave together."""
    ranks = find_ranks()
    try:
        yield ranks
        if ranks.size > 1:
            dist.barrier()
    finally:
        dist.destroy_process_group()


def find_ranks() -> Ranks:
    """Joins the process group that the launcher describes; without a launcher, one rank alone.

    Raises: UserError when a launcher names ranks but no MASTER_ADDR and MASTER_PORT.
    """
    rank, size, local_rank = _from_environment()
    device = _device(local_rank)
    if size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError(
            f"{size} ranks were started, but MASTER_ADDR and MASTER_PORT do not say where rank 0 listens. "
            "Export both before the launch."
        )
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    # By this variable DeepSpeed 0.19.8 makes 62 MB of shared memory on CPU ranks, which only its inference uses, and
    # never frees it (ops/csrc/cpu/comm/shm_interface.cpp).
    os.environ.pop("LOCAL_SIZE", None)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if size > 1:
        dist.init_process_group(backend, rank=rank, world_size=size)
    else:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    return Ranks(rank, size, local_rank, device)


def _from_environment() -> tuple[int, int, int]:
    for names in LAUNCHERS.values():
        if all(name in os.environ for name in names):
            rank, size, local_rank = (int(os.environ[name]) for name in names)
            return rank, size, local_rank
    return 0, 1, 0


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


class StopSignal:
    """Remembers SIGTERM and SIGINT, so that a step ends and is saved before the process leaves."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: object) -> None:
        self.requested = True
