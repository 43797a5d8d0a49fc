"""Each launcher on two hosts of a real cluster on this machine, and a job that Slurm preempts.

`python -m benchmarks.launchers` writes docs/launchers.md: as root, with the programs of tests/cluster/install.sh; about
5 minutes. One rank a host. Fails where a launcher gives other weights than the same run on one host.
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
    """Of all weights in fp32, by name."""
    digest = hashlib.sha256()
    for name, weight in sorted(masters(run, step).items()):
        digest.update(name.encode() + weight.numpy().tobytes())
    return digest.hexdigest()[:16]


def launchers(cluster: Cluster, folder: Path) -> list[str]:
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
    """The checksums of an uninterrupted run and of one whose job was preempted, and that job's log."""
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
    with tempfile.TemporaryDirectory(dir=ROOT / ".cache") as place, Cluster(Path(place) / "cluster") as cluster:
        table = "\n".join(launchers(cluster, Path(place)))
        before, after, log = preempted(cluster, Path(place))
    assert after == before
    SUMMARY.write_text(
        f"# Launchers\n\nMade by `python -m benchmarks.launchers`: the same run of {launched.STEPS} steps, one rank on "
        "each of two hosts (namespaces of one machine, each with its own address and sshd), or two ranks on one. The "
        f"checksum is that of all weights in fp32. {circumstances(2, 'cpu')}.\n\n"
        f"| launcher | hosts | checksum of the weights | seconds |\n|---|---|---|---|\n{table}\n\n"
        "## A job that Slurm preempts\n\nTwo nodes; the partition has a GraceTime of 30 s. Uninterrupted the run ends "
        f"with weights of checksum `{before}`, preempted with `{after}`. The job's log, whole:\n\n```\n{log}```\n"
    )
    print(f"wrote {SUMMARY.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
