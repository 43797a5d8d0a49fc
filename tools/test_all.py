"""Runs the second tier of tests by name, and a sample of the exactness matrix: `make test-all`. At most 90 minutes.

A name is a file of tests, or `matrix`. `make test-all NAMES="slurm matrix"` runs the names that contain one of these
words. What has passed is kept in .cache/test_all.jsonl for this state of the code, so a second start goes on after a
stop or a failure. The output of each name is in .cache/test_all/.
`--record` adds one line to docs/benchmarks.md when everything has passed.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
KEPT = ROOT / ".cache" / "test_all.jsonl"
RECORD = ROOT / "docs" / "benchmarks.md"
HEADING = "## make test-all"
MATRIX = "matrix"
MATRIX_MINUTES = 45
CLUSTER = ("tests/cluster/test_launchers.py", "tests/cluster/test_slurm.py")
"""They use one cluster, so they do not run at once. They fail, and do not skip, if a program is missing."""
NO_CODE = ("docs/", "*.md", "LICENSE")
"""Tracked files that no test of the second tier reads."""
LINES_SHOWN = 60
"""The number of lines that are shown of the output of a failed name."""


@dataclass(frozen=True)
class Result:
    """What came of a name."""

    name: str
    tests: int = 0
    """Tests that passed; of the matrix, modes."""
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.tests > 0 and not self.failed and not self.skipped


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if nothing failed and nothing was skipped."""
    args = parsed(arguments)
    code, tests = source_digest(), second_tier()
    names = chosen([*tests, MATRIX], args.names)
    if args.list:
        print("\n".join(f"{name}: {tests[name]} tests" if name in tests else name for name in names))
        return 0
    kept = kept_results(KEPT, code)
    waiting = [name for name in names if name not in kept]
    print(f"{len(names)} names, {len(names) - len(waiting)} of them passed before with this code", flush=True)
    results = {name: kept[name] for name in names if name in kept}
    for result in run_all(waiting, args.workers, args.minutes):
        results[result.name] = result
        if result.passed:
            keep(KEPT, code, result)
    print(table([results[name] for name in names]))
    left_out = [name for name in (*tests, MATRIX) if name not in names]
    if left_out:
        print(f"{len(left_out)} names were not chosen: make test-all runs them too")
    if not all(result.passed for result in results.values()):
        return 1
    if not left_out:
        line = summary(list(results.values()), revision())
        print(line)
        if args.record:
            record(RECORD, line)
    return 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="run only names that contain one of these; default: all")
    parser.add_argument("--minutes", type=float, default=MATRIX_MINUTES, help="for the sample of the matrix")
    parser.add_argument("--workers", type=int, default=2, help="names that run at once; the matrix runs alone")
    parser.add_argument("--list", action="store_true", help="list the names and stop")
    parser.add_argument("--record", action="store_true", help="add the result to docs/benchmarks.md")
    return parser.parse_args(arguments)


# Names, and what has passed


def second_tier() -> dict[str, int]:
    """Returns the number of tests of the second tier in each file that has some."""
    command = [sys.executable, "-m", "pytest", "-m", "long", "--collect-only", "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: the tests cannot be collected:\n{done.stdout}{done.stderr}")
    return dict(sorted(Counter(re.findall(r"^(tests/\S+?\.py)::", done.stdout, re.MULTILINE)).items()))


def chosen(names: Sequence[str], words: Sequence[str]) -> list[str]:
    """Returns the names that contain one of the words; all without words."""
    for word in words:
        if not any(word in name for name in names):
            raise SystemExit(f"error: no name contains '{word}'. Names: {', '.join(names)}")
    return [name for name in names if not words or any(word in name for word in words)]


def source_digest() -> str:
    """Returns a digest of all tracked files, as they are now, but for documents."""
    exclude = [f":(exclude){pattern}" for pattern in NO_CODE]
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", ".", *exclude]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256()
    for name in sorted(filter(None, listed.split("\0"))):
        if (ROOT / name).is_file():
            digest.update(f"{name}\0".encode() + hashlib.sha256((ROOT / name).read_bytes()).digest())
    return digest.hexdigest()[:16]


def kept_results(file: Path, code: str) -> dict[str, Result]:
    """Returns what has passed with this code, by name."""
    lines = file.read_text().splitlines() if file.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["name"]: Result(**{k: v for k, v in row.items() if k != "code"}) for row in rows if row["code"] == code}


def keep(file: Path, code: str, result: Result) -> None:
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps({"code": code, **asdict(result)}) + "\n")


# Running


def run_all(names: Sequence[str], workers: int, minutes: float):
    """Yields the result of each name as it comes. The matrix is last, since it uses all cores by itself."""
    cluster = threading.Lock()
    pool = ThreadPoolExecutor(workers)
    try:
        started = [pool.submit(run_tests, name, cluster) for name in names if name != MATRIX]
        for future in as_completed(started):
            yield told(future.result())
        if MATRIX in names:
            yield told(run_matrix(minutes))
    finally:
        pool.shutdown(cancel_futures=True)


def told(result: Result) -> Result:
    """Says what came of a name, with the end of its output if it failed."""
    state = "passed" if result.passed else "FAILED" if result.failed or not result.skipped else "skipped"
    print(f"{result.name}: {state} in {result.seconds:.0f} s", flush=True)
    if not result.passed:
        print("\n".join(log_of(result.name).read_text().splitlines()[-LINES_SHOWN:]), flush=True)
    return result


def log_of(name: str) -> Path:
    return ROOT / ".cache" / "test_all" / f"{name.replace('/', '.')}.log"


def run_tests(name: str, cluster: threading.Lock) -> Result:
    """The tests of the second tier in one file."""
    report = log_of(name).with_suffix(".xml")
    report.unlink(missing_ok=True)
    with cluster if name in CLUSTER else nullcontext():
        seconds, code = logged(name, "pytest", "-m", "long", name, "-q", f"--junitxml={report}")
    if not report.is_file():
        return Result(name, failed=1, seconds=seconds)
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    total, failures, errors, skipped = (int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped"))
    failed = failures + errors or int(code != 0)
    return Result(name, max(total - failed - skipped, 0), failed, skipped, seconds)


def run_matrix(minutes: float) -> Result:
    """A sample of the modes that follows from the code."""
    seconds, code = logged(MATRIX, "benchmarks.matrix", "--sample", "--minutes", str(minutes))
    found = re.search(r"(\d+) of \d+ modes, (\d+) outside", log_of(MATRIX).read_text())
    modes, outside = (int(number) for number in found.groups()) if found else (0, 0)
    return Result(MATRIX, modes - outside, outside or int(code != 0), 0, seconds)


def logged(name: str, *module: str) -> tuple[float, int]:
    """Runs a module of Python with its output in the log of a name. Returns its seconds and its exit code."""
    path, start = log_of(name), time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "SORTED_DS_REQUIRE_CLUSTER": "1"}
    with path.open("w") as log:
        command = [sys.executable, "-m", *module]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False)
    return time.monotonic() - start, done.returncode


# Telling


def table(results: Sequence[Result]) -> str:
    width = max(map(len, (result.name for result in results)), default=0)
    lines = [f"{'name':{width}}  passed  failed  skipped  minutes"]
    for r in results:
        lines.append(f"{r.name:{width}}  {r.tests:6}  {r.failed:6}  {r.skipped:7}  {r.seconds / 60:7.1f}")
    return "\n".join(lines)


def revision() -> str:
    command = ["git", "describe", "--always", "--dirty=, with changes"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def summary(results: Sequence[Result], at: str) -> str:
    """Returns the line for docs/benchmarks.md."""
    tests = sum(result.tests for result in results if result.name != MATRIX)
    modes = sum(result.tests for result in results if result.name == MATRIX)
    minutes = sum(result.seconds for result in results) / 60
    return f"- {date.today()}, {at}: {tests} tests and {modes} modes of the matrix passed, {minutes:.0f} minutes in all"


def record(file: Path, line: str) -> None:
    """Adds the line under its heading, which is added at the end if it is not there."""
    text = file.read_text()
    if f"{HEADING}\n" not in text:
        text = f"{text.rstrip()}\n\n{HEADING}\n"
    before, heading, after = text.partition(f"{HEADING}\n")
    section, mark, rest = after.partition("\n## ")
    section = "\n".join([*section.strip().splitlines(), line])
    file.write_text(f"{before}{heading}\n{section}\n{mark}{rest}")


if __name__ == "__main__":
    sys.exit(main())
