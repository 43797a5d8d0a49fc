"""Measures what a checkpoint costs training: the pause of a save, and the time of the steps while it is written.

`python -m benchmarks.saving` trains one engine for each ZeRO stage, 30 M parameters on two gloo ranks. It times steps
with nothing to write, and saves in turn synchronously and asynchronously. The first asynchronous save is reported
alone, because it also allocates the memory for its copy. "MiB a rank" is what a rank writes: its share of fp32 weights
and both moments. "MiB more" is the peak memory while an asynchronous save is written, above that of a step before the
first save (Linux; proc(5), clear_refs).
"""

import argparse
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common import SIZES, Setting, circumstances, engine_of, interval, nested_llama
from sorted_ds.checkpoint import Checkpoints
from sorted_ds.checkpoint.identity import Identity
from sorted_ds.run.config import Optim
from sorted_ds.space import Pass
from tests.batches import batch
from tests.spawn import on_ranks

MIB = 2**20
OPTIM = Optim()


def measure(ranks, stage: int, size_name: str, rounds: int, bf16: bool, folder: str) -> dict:
    """Returns the measured times by name, and the bytes of a rank's file and of the copy."""
    size = SIZES[size_name]
    setting = Setting(size, stage, bf16)
    model = nested_llama(size, dtype=setting.dtype, device=ranks.device)
    engine = engine_of(model, setting, OPTIM, ranks)
    ids = torch.randint(0, size.vocab, (size.rows, size.row_tokens), generator=torch.Generator().manual_seed(1))

    def step() -> float:
        ranks.sum([0])
        began = time.perf_counter()
        loss = engine.forward(batch(ids, ids), Pass(model.space.full)).loss
        engine.backward(loss / (ids.numel() * ranks.size))
        engine.step(1e-4)
        ranks.sum([0])
        return time.perf_counter() - began

    kinds = {kind: Checkpoints(Path(folder) / kind, 1, Identity({}), ranks, kind == "asynchronous") for kind in KINDS}
    number = 0
    found: dict = {"quiet": [], "while": [], "synchronous": [], "asynchronous": [], "written": [], "grown": 0}
    step()
    baseline = peak_memory(step)
    for turn in range(rounds + 1):
        quiet = step()
        for kind in KINDS if turn % 2 else KINDS[::-1]:
            number += 1
            ranks.sum([0])
            step_seconds, results = [], []

            def save(
                kind: str = kind, number: int = number, step_seconds: list = step_seconds, results: list = results
            ) -> None:
                results += kinds[kind].start_save(engine, number)
                while not results:  # as the trainer does
                    if ranks.sum([kinds[kind].is_ready()])[0] == ranks.size:
                        results += kinds[kind].advance()
                    step_seconds.append(step())

            memory = peak_memory(save)
            if kind == "asynchronous":
                found["while"].append(statistics.mean(step_seconds) / quiet)
                found["written"].append(results[0].seconds)
                found["grown"] = max(found["grown"], memory - baseline)
            found[kind].append(results[0].pause_seconds)
        found["quiet"].append(quiet)
        if turn == 0:
            found["first_pause"] = found["asynchronous"][0]
            for key in ("quiet", "while", *KINDS, "written"):
                found[key].clear()
    found["bytes"] = sum(path.stat().st_size for path in (Path(folder) / KINDS[0]).rglob("rank_0000*"))
    return found


KINDS = ("synchronous", "asynchronous")


def peak_memory(work: Callable[[], object]) -> int:
    """Does the work and returns the peak memory of this process during it, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    work()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def row(stage: int, found: dict) -> str:
    cells = [
        stage,
        f"{found['bytes'] / MIB:.0f}",
        interval(found["synchronous"]),
        interval(found["asynchronous"]),
        f"{found['first_pause']:.3f}",
    ]
    return (
        "| "
        + " | ".join(
            map(str, [*cells, interval(found["written"]), interval(found["while"]), f"{found['grown'] / MIB:.0f}"])
        )
        + " |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--size", choices=list(SIZES), default="middle")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    print(circumstances(args.ranks, args.device))
    print("Seconds, medians (95 %). Steps meanwhile: their time over that of a step with nothing to write.\n")
    print(
        "| stage | MiB a rank | pause, synchronous | asynchronous | first | written in | steps meanwhile | MiB more |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for stage in args.stages:
        with tempfile.TemporaryDirectory() as folder:
            measured = (args.ranks, measure, stage, args.size, args.rounds, args.bf16, f"{folder}/checkpoints")
            print(row(stage, on_ranks(*measured, folder=Path(folder), device=args.device)), flush=True)


if __name__ == "__main__":
    main()
