"""Compares every mode of the engine with plain PyTorch, and writes docs/matrix.md. Takes hours; can be stopped anytime.

`python -m benchmarks.matrix --minutes 60` goes on where it stopped, on any machine. Results are kept in
docs/matrix.jsonl, for one state of the code and one version of each package; `--anew` begins again with others. In the
first modes all pairs of settings meet, in the next ones each three and then each four of them, which takes half an
hour. Several can run at once with different `--ranks`. `--device cuda` is a matrix of its own, docs/matrix_cuda.md,
over NCCL; ranks share a GPU if there are too few. `--cover` takes the modes that the tests take. `--sample` is for
`make test-all`: modes that change with the code, kept in .cache; it fails if one is outside its bounds.
"""

import argparse
import json
import platform
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import digest
from benchmarks.kept import append_rows, read_rows
from tests import cover, exactness
from tests.cover import FACTORS, NUM_STEPS, Error, Mode
from tests.spawn import ROOT, on_ranks

LAUNCH_CASES = 15
"""Cases of one launch. A stop loses no more than these."""
HANG_SECONDS = 1800
"""When ranks count as hanging. Other work on the machine may slow them."""
CODE = (
    *(f"sorted_ds/{folder}/*.py" for folder in ("space", "nested", "families", "tasks", "engine")),
    *("tests/exactness.py", "tests/reference.py", "tests/cover.py"),
)
"""What defines a figure: what these files compute (digest.py)."""
SAMPLE = ROOT / ".cache" / "sample"
"""Where the results of `--sample` are kept."""
COLUMNS = (
    *("stage", "offload", "optimizer", "precision", "modes"),
    *("weights", "static", "moments", "static", "norms", "update", "rms"),
)


@dataclass(frozen=True)
class Matrix:
    """The results on one kind of device, in a folder."""

    device: str
    folder: Path = ROOT / "docs"

    @property
    def file(self) -> Path:
        return self.folder / f"matrix{self.suffix}.jsonl"

    @property
    def summary(self) -> Path:
        return self.folder / f"matrix{self.suffix}.md"

    @property
    def command(self) -> str:
        return "python -m benchmarks.matrix" + (f" --device {self.device}" if self.suffix else "")

    @property
    def suffix(self) -> str:
        return "" if self.device == "cpu" else f"_{self.device}"


def versions() -> dict[str, str]:
    """Returns the versions of all that the weights depend on."""
    packages = {name: version(name) for name in ("deepspeed", "torch", "transformers")}
    return {"python": platform.python_version(), **packages, "code": code_digest()}


def code_digest() -> str:
    return digest.code_digest(ROOT, CODE)


def known(matrix: Matrix) -> dict[str, Error]:
    """Returns what an earlier run measured, by the mode's name."""
    return {row.pop("name"): Error(**row) for row in read_rows(matrix.file, versions())}


def measure(modes: Sequence[Mode], device: str) -> dict[str, Error]:
    """Returns the errors of modes with the same number of ranks, by name. Starts the ranks once."""
    call = (modes[0].num_ranks, exactness.run_cases, [mode.case for mode in modes], NUM_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        trained = on_ranks(*call, folder=Path(folder), device=device, hang_seconds=HANG_SECONDS)
    return {mode.name: cover.error(trained[mode.case.name], mode) for mode in modes}


def run(matrix: Matrix, modes: Iterable[Mode], minutes: float) -> None:
    """Measures the modes that are not known yet, and the twins of those in bf16, until the time is over."""
    found, end = known(matrix), time.monotonic() + 60 * minutes
    waiting: dict[int, dict[str, Mode]] = defaultdict(dict)
    for mode in modes:
        if time.monotonic() > end:
            break
        for one in (mode, mode.twin) if mode.case.precision == "bf16" else (mode,):
            if one.name not in found:
                waiting[mode.num_ranks][one.name] = one
        if len(waiting[mode.num_ranks]) >= LAUNCH_CASES:
            found |= kept(matrix, list(waiting.pop(mode.num_ranks).values()))
    for rest in waiting.values():
        if rest and time.monotonic() < end:
            kept(matrix, list(rest.values()))


def kept(matrix: Matrix, modes: Sequence[Mode]) -> dict[str, Error]:
    """Measures the modes, keeps the results in the file, and returns them."""
    measured = measure(modes, matrix.device)
    append_rows(matrix.file, ({"name": name, **_rounded(error)} for name, error in measured.items()))
    print(f"{len(modes)} more, largest {max(error.weights for error in measured.values()):.1e}", flush=True)
    return measured


def _rounded(error: Error) -> dict[str, float]:
    return {key: float(f"{value:.4g}") for key, value in asdict(error).items()}


def sample(matrix: Matrix, modes: Sequence[Mode], minutes: float) -> str:
    """Measures modes in an order that follows from the code, and returns a line that says how many. Exits with an error
    if one is outside its bounds, or if there was no time for any.
    """
    of_other_code = not matrix.file.is_file() or json.loads(matrix.file.read_text().splitlines()[0]) != versions()
    if of_other_code:
        matrix.file.unlink(missing_ok=True)
    shuffled = list(modes)
    random.Random(code_digest()).shuffle(shuffled)
    run(matrix, shuffled, minutes)
    found = known(matrix)
    done = [mode for mode in modes if mode.name in found]
    outside = [mode.name for mode in done if is_outside(mode, found)]
    told = f"{len(done)} of {len(modes)} modes, {len(outside)} outside their bounds"
    if outside or not done:
        raise SystemExit("\n".join([f"error: {told}", *outside]))
    return told


def page(matrix: Matrix, modes: Sequence[Mode], found: dict[str, Error]) -> str:
    """Returns a Markdown page with one line for each stage, offload, optimizer and precision."""
    groups: dict[tuple, list[Mode]] = defaultdict(list)
    for mode in modes:
        case = mode.case
        offload = "all" if case.offload_param else "optimizer" if case.offload else "-"
        groups[case.stage, offload, case.optimizer, case.precision].append(mode)
    done = [mode for mode in modes if mode.name in found]
    outside = [mode.name for mode in done if is_outside(mode, found)]
    names = {mode.name for mode in done}
    settings = cover.allowed()
    strength = cover.strength([each for each in settings if cover.mode_of(each).name in names], settings)
    lines = [
        f"# Every mode against plain PyTorch{' on CUDA' if matrix.device == 'cuda' else ''}\n",
        f"`{matrix.command}`: {len(done)} of {len(modes)} modes, {len(outside)} outside their bounds.",
        f"Each {strength} settings that go together are in one of these modes.",
        f"{', '.join(f'{name} {value}' for name, value in versions().items())}, {where(matrix)}.\n",
        "A line holds 1 to 4 ranks x overlap_comm (stages 2, 3) x clipping x tied embeddings x activation",
        "checkpointing x evaluation in between. Largest difference from one process of plain PyTorch after four",
        "steps of four samples: weights absolute (SGD at rate 1, AdamW at 0.01; in bf16 at 1e-4), AdamW's moments",
        "relative to the largest, gradient norms relative. Static: a network that never changes, in the same modes.",
        "Update: the weights' last step minus what AdamW's formula makes of the mode's own moments, over the rate.",
        "Rms: root mean square of the difference in bf16, over the static network's, the largest.",
        "Bounds: tests/cover.py.\n",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    for key, members in sorted(groups.items()):
        if any(mode.name in found for mode in members):
            lines.append("| " + " | ".join(map(str, [*key, *_row(members, found)])) + " |")
    return "\n".join([*lines, *(f"\nOutside: {name}" for name in outside)]) + "\n"


def is_outside(mode: Mode, found: dict[str, Error]) -> bool:
    """Whether a mode is beyond its bounds, or in bf16 too far from its twin."""
    twin = found.get(mode.twin.name) if mode.case.precision == "bf16" else None
    is_beyond = cover.exceeds(found[mode.name], cover.bounds(mode))
    return is_beyond or (twin is not None and cover.exceeds_static(found[mode.name], twin))


def where(matrix: Matrix) -> str:
    if matrix.device == "cpu":
        return "CPU, gloo"
    num_gpus = torch.cuda.device_count()
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return f"{num_gpus} x {torch.cuda.get_device_name()}, which ranks beyond {num_gpus} share, NCCL {nccl}"


def _row(members: Sequence[Mode], found: dict[str, Error]) -> list[str]:
    own = [found[m.name] for m in members if m.name in found]
    pairs = [(found[m.name], found[m.twin.name]) for m in members if m.name in found and m.twin.name in found]
    twins = [twin for _, twin in pairs]
    told = [f"{len(own)}/{len(members)}"]
    columns = (
        (own, "weights"),
        (twins, "weights"),
        (own, "moments"),
        (twins, "moments"),
        (own, "norms"),
        (own, "update"),
    )
    for errors, kind in columns:
        largest = max((getattr(error, kind) for error in errors), default=0.0)
        told.append(f"{largest:.1e}" if largest else "-")
    return [*told, f"{max(error.rms / twin.rms for error, twin in pairs):.2f}" if pairs else "-"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=600, help="stop after about so long")
    parser.add_argument("--ranks", type=int, nargs="+", default=FACTORS["num_ranks"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cover", action="store_true", help="only the modes of tests/engine/test_cover.py")
    parser.add_argument("--anew", action="store_true", help="throw away what is known")
    parser.add_argument("--sample", action="store_true", help="modes that change with the code, for make test-all")
    args = parser.parse_args()
    settings = cover.allowed()
    modes = [cover.mode_of(setting) for setting in settings]
    if args.sample:
        print(sample(Matrix(args.device, SAMPLE), modes, args.minutes))
        return
    matrix = Matrix(args.device)
    if args.anew:
        matrix.file.unlink(missing_ok=True)
    chosen = cover.cover(settings) if args.cover else cover.in_order(settings)
    wanted = [cover.mode_of(setting) for setting in chosen if setting["num_ranks"] in args.ranks]
    run(matrix, wanted, args.minutes)
    matrix.summary.write_text(page(matrix, modes, known(matrix)))
    print(matrix.summary)


if __name__ == "__main__":
    main()
