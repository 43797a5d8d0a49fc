"""Injures real runs at random moments, starts them again, and counts what that cost. About 40 s a fault.

`python -m benchmarks.faults --minutes 60` goes on where it stopped; what is known is kept in .cache/faults.jsonl, of
one state of the code and its versions (`--anew` begins again with others), and summed up in docs/faults.md. A *life* is
one run that meets several faults until it is through; then its weights must be those of an uninterrupted run, bit for
bit, and each step must be reported once, with the same loss and gradient norm. The lives in Slurm need root and
tests/cluster/install.sh; `--no-cluster` leaves them out.
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
from benchmarks.kept import keep, kept_rows
from benchmarks.lives import SECONDS_TO_END, STEPS, Fault, live, live_in_slurm, settings
from sorted_ds.run.run_dir import code_digest, versions
from tests import launched
from tests.cluster.machines import Cluster, missing_programs, refusal_of_hosts
from tests.runs import run_file
from tests.spawn import ROOT

FAULTS_OF_A_LIFE, FAULTS_IN_SLURM, EVERY = 4, 3, 4
KNOWN = ROOT / ".cache" / "faults.jsonl"
SUMMARY = ROOT / "docs" / "faults.md"


def plan(number: int) -> list[str]:
    """The faults of a life: on this machine; every fourth life is in Slurm, and each kind there has its turn."""
    chance = random.Random(number)
    if is_in_slurm(number):
        first = number // EVERY * FAULTS_IN_SLURM
        return [list(CLUSTER)[(first + n) % len(CLUSTER)] for n in range(FAULTS_IN_SLURM)]
    kinds = [*KILLS] * 2 + ["kill -9 of a rank"] * 3 + ["kill -9 of a launcher"] * 2 + [*DAMAGES] * 2
    kinds.remove("SIGSTOP of a rank")  # half a minute each
    return [chance.choice(kinds) for _ in range(FAULTS_OF_A_LIFE)]


def is_in_slurm(number: int) -> bool:
    return number % EVERY == EVERY - 1


def known() -> dict[int, list[Fault]]:
    rows = kept_rows(KNOWN, {**versions(), "code": code_digest()})
    return {row["life"]: [Fault(**fault) for fault in row["faults"]] for row in rows}


COLUMNS: dict[str, Callable[[Sequence[Fault]], object]] = {
    "number": len,
    "went on bit-equal": lambda some: sum(f.equal for f in some),
    "steps otherwise": lambda some: sum(f.steps_otherwise for f in some),
    "unreported": lambda some: sum(f.steps_unreported for f in some),
    "failed starts": lambda some: sum(f.failed_starts for f in some),
    "submitted again": lambda some: sum(f.submitted_again for f in some),
    "left": lambda some: sum(f.left_over for f in some),
    "seconds to end": lambda some: spread([f.seconds_to_end for f in some]),
    "to resume": lambda some: spread([f.seconds_to_resume for f in some if f.seconds_to_resume]),
}
LEGEND = f"""\
Steps otherwise: trained twice, or with another loss or gradient norm than the
uninterrupted run's; unreported: missing in the curves.
Failed starts: ended with an error, or without a model, though no fault had struck them. Submitted again:
jobs that failed, so that Slurm did not start them again by itself. Left: runs that had not ended after {SECONDS_TO_END}
s, or trained on to the end, and jobs that Slurm held until they were released by hand. To end: from the fault until no
process of the run was left; to resume: from the next start to its first step. In Slurm, to end: until the job was
queued again or over (at its own end, where the fault did not end it); to resume: from the fault to the first step after
it, with the time that the job was queued. Seconds are median (largest)."""


def table(faults: Sequence[Fault]) -> str:
    lines = [f"| fault | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for kind in [*KILLS, *DAMAGES, *CLUSTER]:
        if some := [fault for fault in faults if fault.kind == kind]:
            lines.append(f"| {kind} | {' | '.join(str(tell(some)) for tell in COLUMNS.values())} |")
    equal, halves = sum(f.equal for f in faults), sum(f.half_saved for f in faults)
    lines += ["", f"{len(faults)} faults, {equal} continued to bit-equal weights; {halves} struck while a checkpoint"]
    lines += [f"was half written. {LEGEND}", "", "Those that cost something:", ""]
    lines += [f"- {fault}" for fault in faults if not fault.cost_nothing] or ["- none"]
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({max(values):.1f})" if values else ""


def write_summary(faults: Sequence[Fault]) -> None:
    moments = {moment: sum(f.moment == moment for f in faults) for moment in dict.fromkeys(f.moment for f in faults)}
    told = ", ".join(f"{number} at {moment}" for moment, number in moments.items())
    SUMMARY.write_text(
        f"# Faults\n\nMade by `python -m benchmarks.faults`: runs of {STEPS} steps, a checkpoint each 10, injured at "
        f"random moments ({told}) and started again. {circumstances(2, 'cpu')}.\n\n{table(faults)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--faults", type=int, default=100, help="stop when so many are known")
    parser.add_argument("--no-cluster", action="store_true")
    parser.add_argument("--anew", action="store_true", help="throw away what is known")
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
                keep(KNOWN, [{"life": number, "faults": [asdict(fault) for fault in faults]}])
                for fault in faults:
                    print(fault, flush=True)
                write_summary([fault for life in lives.values() for fault in life])
            number += 1
    print(table([fault for life in lives.values() for fault in life]))


def one_life(number: int, original: Path, run: Path) -> list[Fault]:
    chance, kinds = random.Random(f"life {number}"), plan(number)
    if not is_in_slurm(number):
        return live(original, run, kinds, chance)
    with Cluster(run.parent / "cluster") as cluster:
        return live_in_slurm(original, run, kinds, chance, cluster)


if __name__ == "__main__":
    main()
