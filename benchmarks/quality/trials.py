"""One trial of the test bed: a run with a few settings changed, at a given cost, and what came of it.

In: a `Trial`. Out: the loss and the accuracy of every sub-network. On disk: the run in .cache/quality, which goes on
after a stop, and a line in results.jsonl, which is committed. A result is found again by the trial's settings, the bed
and its text; the line also says with which code and versions it was measured.

All trials of a share of the budget cost the same number of FLOPs, with teachers, exits and heads counted, so a trial
with smaller sub-networks takes more steps and sees more tokens.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.digest import code_digest
from sorted_ds.run.checks import check_run
from sorted_ds.run.config import Run
from sorted_ds.run.plan import Plan, make_plan
from sorted_ds.run.run_dir import versions
from sorted_ds.run.run_file import load_run
from sorted_ds.space import SubNet

ROOT = Path(__file__).parents[2]
BED = Path(__file__).with_name("bed.toml")
RESULTS = Path(__file__).with_name("results.jsonl")
FOLDER = ROOT / ".cache" / "quality"
BUDGET_TOKENS = 3_700_000
"""1 C is the cost of training the full network alone on so many tokens."""
CODE = tuple(f"sorted_ds/{folder}/**/*.py" for folder in ("space", "nested", "families", "tasks", "engine"))
STEPS_OF_PLAN = 1000
"""The cost of a step is the mean of so many."""


@dataclass(frozen=True)
class Trial:
    """One run of the test bed."""

    name: str
    overrides: tuple[str, ...] = ()
    """`section.key=value`. `{0.8}` in a value becomes the step at that part of the run."""
    seed: int = 1
    share: float = 1.0
    """The cost, in units of C."""
    alone: str = ""
    """The sub-network that is trained alone, as a network of its own; empty for a family."""

    @property
    def settings(self) -> tuple[str, ...]:
        """The overrides, with those of a network that is trained alone."""
        return (*alone_settings(self.alone), *self.overrides, f"seed={self.seed}")

    def key(self, text: str) -> str:
        """Returns what a result is found by. `text`: the checksum of the text."""
        facts = [BED.read_text(), text, BUDGET_TOKENS, self.share, sorted(self.settings)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def run(self, *more: str) -> Run:
        return load_run(BED, (*self.settings, *more))

    def overrides_at(self, steps: int) -> list[str]:
        """Returns the settings for a run of so many steps."""
        found = [f"train.steps={steps}"]
        for text in self.settings:
            for part in {piece.split("}")[0] for piece in text.split("{")[1:] if _is_number(piece.split("}")[0])}:
                text = text.replace(f"{{{part}}}", str(max(1, round(float(part) * steps))))
            found.append(text)
        return found

    def plan(self, steps: int) -> Plan:
        run = load_run(BED, self.overrides_at(steps))
        config, space = check_run(run)
        return make_plan(run, space, config, num_ranks=1)

    def num_steps(self) -> int:
        """Returns how many steps the trial's cost pays for."""
        steps = STEPS_OF_PLAN
        for _ in range(3):  # phases change the cost of a step
            steps = max(1, round(self.share * budget_flops() * steps / self.plan(steps).flops.run))
        return steps


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def alone_settings(name: str) -> tuple[str, ...]:
    """Returns the settings of a network that is one sub-network of the bed."""
    if not name:
        return ()
    subnet = SubNet.parse(name)
    queries = 2
    sizes = {
        "num_hidden_layers": subnet.depth,
        "num_attention_heads": queries * subnet["g"],
        "num_key_value_heads": subnet["g"],
        "intermediate_size": subnet["f"],
    }
    space = (f"space.depths=[{subnet.depth}]", f"space.groups=[{subnet['g']}]", f"space.ffn=[{subnet['f']}]")
    own = tuple(f"model.config.{key}={value}" for key, value in sizes.items())
    return (*own, *space, "sampling.strategy=full", "sampling.subnets_per_step=1")


def budget_flops() -> float:
    """Returns the FLOPs of 1 C."""
    plan = Trial("full", alone="d6-g4-f384").plan(STEPS_OF_PLAN)
    return plan.flops.run / (plan.steps * plan.tokens_per_step) * BUDGET_TOKENS


def measure(trial: Trial, text: str) -> dict[str, Any]:
    """Trains, and returns the row of results.jsonl. A run that was stopped goes on. Raises: SystemExit if it fails."""
    key, steps = trial.key(text), trial.num_steps()
    run_dir, log = FOLDER / "runs" / key, FOLDER / "runs" / f"{key}.log"
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    command = [str(Path(sys.executable).parent / "sorted-ds"), "train", str(BED), *trial.overrides_at(steps)]
    began, goes_on = time.perf_counter(), run_dir.exists()
    with log.open("a") as output:
        done = subprocess.run(
            [*command, f"run_dir={run_dir}", "--ranks", "1"], stdout=output, stderr=output, check=False, cwd=ROOT
        )
    if done.returncode:
        raise SystemExit(f"{trial.name} failed: {log}")
    plan = trial.plan(steps)
    row = {
        "key": key,
        "trial": trial.name,
        "seed": trial.seed,
        "share": trial.share,
        "alone": trial.alone,
        "settings": list(trial.settings),
        "steps": steps,
        "tokens": steps * plan.tokens_per_step,
        "tflop": plan.flops.run / 1e12,
        "minutes": None if goes_on else (time.perf_counter() - began) / 60,
        "table": table_of(run_dir),
        "code": code_digest(ROOT, CODE),
        "versions": versions(),
        "date": date.today().isoformat(),
    }
    shutil.rmtree(run_dir)
    log.unlink()
    return row


def table_of(run_dir: Path) -> dict[str, list[float]]:
    """Returns the loss in nats and the accuracy of each sub-network, by name."""
    rows = json.loads((run_dir / "subnets.json").read_text())["subnets"]
    return {row["subnet"]: [row["loss"], row["accuracy"]] for row in rows}


def kept_rows() -> dict[str, dict[str, Any]]:
    """Returns the rows of results.jsonl by key."""
    lines = RESULTS.read_text().splitlines() if RESULTS.is_file() else []
    return {row["key"]: row for row in map(json.loads, lines)}


def keep(row: Mapping[str, Any]) -> None:
    """Adds a row to results.jsonl."""
    with RESULTS.open("a") as lines:
        lines.write(json.dumps(row) + "\n")
