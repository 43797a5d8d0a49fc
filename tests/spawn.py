"""Runs a function of a test or benchmark on real ranks, each a process of its own, and returns what rank 0 returns.

File rendezvous instead of a port search; a hang limit ends all ranks; any rank's failure fails the test with its text.
On the CPU ranks are forked from a process that has imported everything: 5 s of each rank's time otherwise.
"""

import importlib
import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import NoReturn
from unittest import mock

HANG_SECONDS = 420
ROOT = Path(__file__).parent.parent


def on_ranks(num_ranks: int, function, *args, folder: Path, device: str = "cpu", hang_seconds: int = HANG_SECONDS):
    """`function(ranks, *args)` on `num_ranks` ranks, gloo on the CPU or NCCL on CUDA; the result of rank 0."""
    folder.mkdir(parents=True, exist_ok=True)
    call = folder / "call.pickle"
    module = function.__module__ if function.__module__ != "__main__" else sys.modules["__main__"].__spec__.name
    call.write_bytes(pickle.dumps((module, function.__qualname__, args, device)))
    for old in folder.glob("rendezvous*"):
        old.unlink()
    context = context_of(device)
    processes, logs = [], []
    for rank in range(num_ranks):
        logs.append(folder / f"rank{rank}.log")
        environment = _environment(rank, num_ranks, device)
        process = context.Process(target=_rank_main, args=(folder, environment, Path.cwd(), logs[-1]))
        process.start()
        processes.append(process)
    _wait(processes, logs, hang_seconds)
    return pickle.loads((folder / "result.pickle").read_bytes())


def context_of(device: str):
    """What starts processes: forked from one that has imported everything. CUDA does not survive a fork."""
    if device == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    with mock.patch.dict(os.environ, _environment(0, 1, device)):
        forkserver.ensure_running()
    return context


def _environment(rank: int, num_ranks: int, device: str) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "DS_ACCELERATOR": device,
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # one ninja for all
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions")),
        **(_on_gpus(rank, num_ranks) if device == "cuda" else {}),
    }


def _on_gpus(rank: int, num_ranks: int) -> dict[str, str]:
    """Where there are fewer GPUs than ranks, ranks share them: slow, and right.

    NCCL refuses two ranks on one GPU of one host, so each rank says that it is a host of its own, and they talk by
    sockets. Source: NCCL's user guide, environment variables.
    """
    import torch

    num_gpus = torch.cuda.device_count()
    apart = {"NCCL_HOSTID": f"rank{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    return {"LOCAL_RANK": str(rank % num_gpus), **(apart if num_ranks > num_gpus else {})}


def _wait(processes: list, logs: list[Path], hang_seconds: int) -> None:
    end = time.monotonic() + hang_seconds
    try:
        while any(process.exitcode is None for process in processes):
            if any(process.exitcode not in (None, 0) for process in processes) or time.monotonic() > end:
                break
            time.sleep(0.05)
        failed = [n for n, process in enumerate(processes) if process.exitcode != 0]
    finally:
        for process in processes:
            process.kill()
            process.join()
    if failed:
        texts = "\n".join(f"--- rank {n}\n{logs[n].read_text()[-6000:]}" for n in failed)
        raise AssertionError(f"ranks {failed} failed or hung:\n{texts}")


def _rank_main(folder: Path, environment: dict[str, str], where: Path, log: Path) -> None:
    """One rank, in a process of its own."""
    enter(environment, where, log)
    leave(lambda: _run(folder))


def enter(environment: Mapping[str, str], where: Path, log: Path) -> None:
    """Makes a forked process one that was started there, with this environment, and that writes to `log`."""
    with log.open("w") as out:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(out.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(where)


def leave(work: Callable[[], int | None]) -> NoReturn:
    """Does the work, and ends the process with the code that it returns or leaves with; with 1 where it raises."""
    try:
        code = work() or 0
    except SystemExit as left:
        code = left.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a gloo thread sometimes aborts at interpreter exit, after the work is done


def _run(folder: Path) -> None:
    import torch
    import torch.distributed as dist

    from sorted_ds.cluster.ranks import Ranks

    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    module, name, args, kind = pickle.loads((folder / "call.pickle").read_bytes())
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    result = getattr(importlib.import_module(module), name)(Ranks(rank, size, local_rank, device), *args)
    if rank == 0:
        (folder / "result.pickle").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
