"""How good are sub-networks that were never trained? `python -m benchmarks.mix_n_match`.

Two networks of the demo's size are trained on the Python standard library, with the same seed, rows and steps: one on a
ladder of a dozen sub-networks, one on the grid of all 54 that can be cut from it. Every one of the 54 is evaluated in
both. So each that the ladder never trained is compared with itself after training, and with the ladder's own
sub-networks of about its size. A command that was stopped goes on. It trains for minutes.
"""

import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

from sorted_ds.deploy.evaluate import evaluate_family
from sorted_ds.deploy.family import TrainedFamily, load
from sorted_ds.deploy.model_dir import Measured, ModelDir
from sorted_ds.space import SubNet
from tools.demo import DEMO, ROOT, copy_standard_library

FOLDER = ROOT / ".cache" / "mix_n_match"
STEPS = 200
LADDER = (
    "d1-g1-f96",
    "d2-g1-f96",
    "d2-g1-f192",
    "d2-g2-f192",
    "d3-g1-f192",
    "d3-g2-f192",
    "d3-g2-f384",
    "d4-g2-f192",
    "d4-g2-f384",
    "d4-g4-f384",
    "d5-g4-f384",
    "d6-g4-f384",
)
SETTINGS = ("batch.micro_batch_rows=8", "checkpoint.every_steps=100", "eval.every_steps=0", "log.tensorboard=false")
NAMES = ", ".join(f'"{name}"' for name in LADDER)
SPACES = {
    "ladder": ("space.depths=[]", "space.groups=[]", "space.ffn=[]", f"space.subnets=[{NAMES}]"),
    "grid": ("space.depths=[1, 2, 3, 4, 5, 6]",),
}


def main() -> None:
    if not (DEMO / "text").exists():
        copy_standard_library()
    ladder = evaluated("ladder")
    print_against_ladder(ladder)
    print_against_grid(ladder, evaluated("grid"))


def evaluated(name: str) -> dict[str, Measured]:
    """Returns the rows of all sub-networks that can be cut. What an earlier start has done is not done again."""
    run_dir = FOLDER / name
    if not (run_dir / "model" / "sorted.json").is_file():
        train(name, run_dir)
    family = load(run_dir)
    if left := without_row(family):
        evaluate_family(family, left, report=lambda subnet: print(f"{name}: evaluating {subnet}", file=sys.stderr))
    return {row.subnet: row for row in family.where.table()}


def train(name: str, run_dir: Path) -> None:
    overrides = (*SPACES[name], f"run_dir={run_dir}", f"train.steps={STEPS}", *SETTINGS)
    command = str(Path(sys.executable).parent / "sorted-ds")
    subprocess.run([command, "train", "launch/runs/demo.toml", *overrides, "--ranks", "1"], cwd=ROOT, check=True)


def without_row(family: TrainedFamily) -> list[SubNet]:
    known = {row.subnet for row in ModelDir.find(family.where.root).read().subnets}
    return [subnet for subnet in family.cuttable if subnet.name not in known]


def print_against_ladder(ladder: dict[str, Measured]) -> None:
    """Prints what the losses of never-trained ones are above those of trained ones of the same size."""
    trained, never = ([row for row in ladder.values() if row.is_trained == is_trained] for is_trained in (True, False))
    print("| sub-network | parameters | loss | above the ladder at its size |")
    print("|---|---:|---:|---:|")
    above = {row.subnet: row.loss - loss_at(row.parameters, trained) for row in never}
    for row in never:
        print(f"| {row.subnet} | {row.parameters:,} | {row.loss:.3f} | {above[row.subnet]:+.3f} |")
    print(f"\n{len(never)} never-trained ones are above the ladder at their size by {spread(list(above.values()))}.")
    between = [above[row.subnet] for row in never if differs_in_depth_alone(row.subnet)]
    print(f"{len(between)} of them, which differ in depth alone from a trained one, by {spread(between)}.", flush=True)


def print_against_grid(ladder: dict[str, Measured], grid: dict[str, Measured]) -> None:
    """Prints what the losses in the ladder's network are above those in the network that trained all of them."""
    for is_trained, what in ((True, "trained"), (False, "never-trained")):
        above = [row.loss - grid[row.subnet].loss for row in ladder.values() if row.is_trained == is_trained]
        print(f"{len(above)} {what} ones are above themselves in the grid by {spread(above)}.", flush=True)


def differs_in_depth_alone(name: str) -> bool:
    widths = {SubNet.parse(other).replace(d=1) for other in LADDER}
    return SubNet.parse(name).replace(d=1) in widths


def loss_at(parameters: int, trained: list[Measured]) -> float:
    """Returns the loss between the trained ones of the next smaller and larger size, linear in the log of the size."""
    sizes, losses = [row.parameters for row in trained], [row.loss for row in trained]
    return float(np.interp(np.log(parameters), np.log(sizes), losses))


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):+.3f} (median, from {min(values):+.3f} to {max(values):+.3f})"


if __name__ == "__main__":
    main()
