"""Trains the same run with each launcher on two hosts, and as a job that Slurm preempts, and compares the weights.

The hosts are a real cluster on this machine, with one rank a host. `python -m benchmarks.launchers` writes
docs/launchers.md in about 5 minutes; it needs root and the programs of tests/cluster/install.sh. It fails if a launcher
gives other weights than the same run on one host.
"""

import hashlib
import tempfile
import time
from pathlib import Path

from benchmarks.common import circumstances
from tests import launched
from tests.cluster.machines import Cluster
from tests.cluster.test_launchers import FROM_ONE_HOST, NODE_BY_NODE, start
from tests.cluster.test_slurm import LONGER, STEPS, Job, preempt
from tests.launched import ROOT, copied, masters, run_dir
from tests.runs import run_file

SUMMARY = ROOT / "docs" / "launchers.md"


def checksum(run: Path, step: int = launched.STEPS) -> str:
    """Returns a checksum over the names and values of all weights in fp32."""
    digest = hashlib.sha256()
    for name, weight in sorted(masters(run, step).items()):
        digest.update(name.encode() + weight.numpy().tobytes())
    return digest.hexdigest()[:16]


def launchers(cluster: Cluster, folder: Path) -> list[str]:
    """Returns a table row for each launcher. Raises: AssertionError when a launcher gives other weights."""
    whole = run_file(folder / "whole")
    launched.train_by_command(whole)
    expected = checksum(whole)
    lines = [f"| `sorted-ds train --ranks 2` | 1 | `{expected}` | |"]
    for number, name in enumerate((*FROM_ONE_HOST, *NODE_BY_NODE)):
        run = copied(whole, folder / str(number), keep_steps=0)
        began = time.monotonic()
        start(cluster, run, name)
        seconds, found = time.monotonic() - began, checksum(run)
        assert found == expected, name
        lines.append(f"| {name} | 2 | `{found}` | {seconds:.0f} |")
        print(lines[-1], flush=True)
    return lines


def preempted(cluster: Cluster, folder: Path) -> tuple[str, str, str]:
    """Returns the checksums of an uninterrupted run and of one whose job was preempted, and that job's log."""
    whole = run_file(folder / "longer")
    launched.train(whole, *LONGER)
    run = run_file(folder / "preempted")
    job = Job(cluster, run)
    job.reach_step(5)
    preempt(cluster)
    assert job.end() == "COMPLETED", job.log
    return (
        checksum(whole, STEPS),
        checksum(run, STEPS),
        job.log.replace(str(run_dir(run)), "RUN_DIR").replace(f"{run.parent}/", ""),
    )


def main() -> None:
    with tempfile.TemporaryDirectory(dir=ROOT / ".cache") as folder, Cluster(Path(folder) / "cluster") as cluster:
        table = "\n".join(launchers(cluster, Path(folder)))
        before, after, log = preempted(cluster, Path(folder))
    assert after == before
    SUMMARY.write_text(
        f"# Launchers\n\n`python -m benchmarks.launchers` trained the same run of {launched.STEPS} steps with one rank "
        "on each of two hosts (namespaces of one machine, each with its own address and sshd), or with two ranks on "
        f"one host. The checksum is over all weights in fp32. {circumstances(2, 'cpu')}.\n\n"
        f"| launcher | hosts | checksum of the weights | seconds |\n|---|---|---|---|\n{table}\n\n"
        "## A job that Slurm preempts\n\nThe job has two nodes, and its partition a GraceTime of 30 s. The checksum of "
        f"the weights is `{before}` without an interruption and `{after}` after the preemption. The whole log of the "
        f"job:\n\n```\n{log}```\n"
    )
    print(f"wrote {SUMMARY.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
