"""Injects faults into real runs at random moments, starts the runs again, and counts what the faults cost.

`python -m benchmarks.faults --minutes 60` continues where it stopped; a fault takes about 40 s. The results are kept in
.cache/faults.jsonl and summed up in docs/faults.md. They belong to one state of the code and its packages; `--anew`
deletes them. A *life* is one run that meets several faults until it is finished. Its weights must then equal those of
an uninterrupted run bit for bit, and each step must be reported once, with the same loss and gradient norm. The lives
in Slurm need root and tests/cluster/install.sh; `--no-cluster` leaves them out.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.common import circumstances
from benchmarks.injuries import CLUSTER, DAMAGES, KILLS, fresh
from benchmarks.kept import append_rows, read_rows
from benchmarks.lives import SECONDS_TO_END, STEPS, Fault, live, live_in_slurm, settings
from sorted_ds.run.run_dir import code_digest, versions
from tests import launched
from tests.cluster.machines import Cluster, missing_programs, refusal_of_hosts
from tests.runs import run_file
from tests.spawn import ROOT

FAULTS_PER_LIFE, FAULTS_PER_SLURM_LIFE, SLURM_EVERY_LIVES = 4, 3, 4
KNOWN = ROOT / ".cache" / "faults.jsonl"
SUMMARY = ROOT / "docs" / "faults.md"


def plan(number: int) -> list[str]:
    """Returns the kinds of faults of a life. Every fourth life is in Slurm, where the kinds take turns."""
    chance = random.Random(number)
    if is_in_slurm(number):
        first = number // SLURM_EVERY_LIVES * FAULTS_PER_SLURM_LIFE
        return [list(CLUSTER)[(first + n) % len(CLUSTER)] for n in range(FAULTS_PER_SLURM_LIFE)]
    kinds = [*KILLS] * 2 + ["kill -9 of a rank"] * 3 + ["kill -9 of a launcher"] * 2 + [*DAMAGES] * 2
    kinds.remove("SIGSTOP of a rank")  # each takes half a minute
    return [chance.choice(kinds) for _ in range(FAULTS_PER_LIFE)]


def is_in_slurm(number: int) -> bool:
    return number % SLURM_EVERY_LIVES == SLURM_EVERY_LIVES - 1


def known() -> dict[int, list[Fault]]:
    """Returns the faults of the lives that were measured with this code and these packages."""
    rows = read_rows(KNOWN, {**versions(), "code": code_digest()})
    return {row["life"]: [Fault(**fault) for fault in row["faults"]] for row in rows}


COLUMNS: dict[str, Callable[[Sequence[Fault]], object]] = {
    "number": len,
    "resumed bit-equal": lambda some: sum(f.is_bit_equal for f in some),
    "different steps": lambda some: sum(f.different_steps for f in some),
    "unreported steps": lambda some: sum(f.unreported_steps for f in some),
    "failed starts": lambda some: sum(f.failed_starts for f in some),
    "submitted again": lambda some: sum(f.submitted_again for f in some),
    "left over": lambda some: sum(f.left_over for f in some),
    "seconds to end": lambda some: spread([f.seconds_to_end for f in some]),
    "seconds to resume": lambda some: spread([f.seconds_to_resume for f in some if f.seconds_to_resume]),
}
LEGEND = f"""\
*Different steps* were trained twice, or with another loss or gradient norm than in the uninterrupted run. *Unreported
steps* are missing in the curves. *Failed starts* ended with an error or without a model, although no fault had struck
them. *Submitted again* counts jobs that failed, so that Slurm did not requeue them by itself. *Left over* counts runs
that had not ended after {SECONDS_TO_END} s or trained on to the end, and jobs that Slurm held until they were released
by hand. *Seconds to end* count from the fault until no process of the run was left, and *seconds to resume* from the
next start to its first step. In Slurm, *seconds to end* count until the job was queued again or over (at its own end,
if the fault did not end it), and *seconds to resume* from the fault to the first step after it, with the time in the
queue. Seconds are the median (the largest)."""


def table(faults: Sequence[Fault]) -> str:
    lines = [f"| fault | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for kind in [*KILLS, *DAMAGES, *CLUSTER]:
        if some := [fault for fault in faults if fault.kind == kind]:
            lines.append(f"| {kind} | {' | '.join(str(column(some)) for column in COLUMNS.values())} |")
    equal, halves = sum(f.is_bit_equal for f in faults), sum(f.half_saved for f in faults)
    lines += ["", f"After {equal} of {len(faults)} faults the run ended with bit-equal weights. {halves} faults struck"]
    lines += [f"while a checkpoint was half written. {LEGEND}", "", "Faults that cost something:", ""]
    lines += [f"- {fault}" for fault in faults if not fault.cost_nothing] or ["- none"]
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({max(values):.1f})" if values else ""


def write_summary(faults: Sequence[Fault]) -> None:
    moments = {moment: sum(f.moment == moment for f in faults) for moment in dict.fromkeys(f.moment for f in faults)}
    counts = ", ".join(f"{number} at {moment}" for moment, number in moments.items())
    SUMMARY.write_text(
        f"# Faults\n\n`python -m benchmarks.faults` injected faults into runs of {STEPS} steps with a checkpoint every "
        f"10 steps, at random moments ({counts}), and started the runs again. {circumstances(2, 'cpu')}.\n\n"
        f"{table(faults)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--faults", type=int, default=100, help="stop when so many were injected")
    parser.add_argument("--no-cluster", action="store_true")
    parser.add_argument("--anew", action="store_true", help="delete earlier results")
    args = parser.parse_args()
    if args.anew:
        KNOWN.unlink(missing_ok=True)
    end, lives = time.monotonic() + 60 * args.minutes, known()
    with_cluster = not (args.no_cluster or missing_programs() or refusal_of_hosts())
    with tempfile.TemporaryDirectory(dir=ROOT / ".cache") as folder:
        original = run_file(Path(folder) / "original")
        launched.train_by_command(original, *settings(STEPS), "train.hang_minutes=30")  # DeepSpeed may compile
        number = 0
        while time.monotonic() < end and sum(map(len, lives.values())) < args.faults:
            if number not in lives and (with_cluster or not is_in_slurm(number)):
                faults = one_life(number, original, fresh(original, Path(folder) / f"life{number}"))
                lives[number] = faults
                append_rows(KNOWN, [{"life": number, "faults": [asdict(fault) for fault in faults]}])
                for fault in faults:
                    print(fault, flush=True)
                write_summary([fault for life in lives.values() for fault in life])
            number += 1
    print(table([fault for life in lives.values() for fault in life]))


def one_life(number: int, original: Path, run: Path) -> list[Fault]:
    """Lets a run live through the faults of life `number`, and returns them."""
    chance, kinds = random.Random(f"life {number}"), plan(number)
    if not is_in_slurm(number):
        return live(original, run, kinds, chance)
    with Cluster(run.parent / "cluster") as cluster:
        return live_in_slurm(original, run, kinds, chance, cluster)


if __name__ == "__main__":
    main()
