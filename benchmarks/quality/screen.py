"""Tries settings on the test bed: `python -m benchmarks.quality.screen [WORDS]`. Takes hours, and goes on after a stop.

In: the trials below; with WORDS only those whose name contains one of them. Out: a table with the mean and the spread
over seeds of each setting. On disk: results.jsonl (trials.py). Start it at a low priority: it uses a core for each
worker.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from benchmarks.quality.text import text_file
from benchmarks.quality.trials import FOLDER, Trial, keep, kept_rows, measure

FULL, SMALL, MIDDLE = "d6-g4-f384", "d2-g2-f192", "d4-g2-f192"
SHOWN = (SMALL, MIDDLE, FULL)


def tuned(name: str, *overrides: str, rows: Sequence[int], rates: Sequence[float], **more: Any) -> list[Trial]:
    """Returns a trial for each number of rows a step and each learning rate."""
    return [
        Trial(f"{name}, {number} rows, {rate:g}", (*overrides, *steps_of(number, rate)), **more)
        for number in rows
        for rate in rates
    ]


def steps_of(rows: int, rate: float) -> tuple[str, str]:
    return f"batch.step_rows={rows}", f"optim.learning_rate={rate}"


FULL_PLUS_4 = ("sampling.strategy=full_plus", "sampling.subnets_per_step=4")
FULL_PLUS_2 = ("sampling.strategy=full_plus", "sampling.subnets_per_step=2")
EXITS = ("loss.exit_weight=0.3",)
SOME_EXITS = (*EXITS, "loss.exit_rate=0.25")
HALF_FULL = (*FULL_PLUS_4, "sampling.full_shares=2")
"""The full network trains on half of the rows, and two others on a quarter each."""
FULL_FIRST = ("sampling.strategy=full", 'sampling.phases=[{from_step = {0.2}, strategy = "full_plus"}]')
"""A warm start: the full network alone on the first fifth of the steps."""
FULL_LAST = "sampling.phases=[{from_step = {0.8}, full_shares = 2}]"
"""The full network's rows grow to a half in the last fifth."""
TAUGHT = ("sampling.subnets_per_share=2", "loss.teacher=full", "loss.teacher_weight=0.3")
TRIALS = [
    # What differs from seed to seed.
    *tuned("full_plus 2", *FULL_PLUS_2, rows=(8,), rates=(3e-3,)),
    *tuned("full_plus 2", *FULL_PLUS_2, rows=(8,), rates=(3e-3,), seed=2),
    *tuned("full_plus 4", *FULL_PLUS_4, rows=(8,), rates=(3e-3,)),
    *tuned("full_plus 4", *FULL_PLUS_4, rows=(8,), rates=(3e-3,), seed=2),
    *tuned("alone", rows=(8,), rates=(3e-3,), alone=FULL),
    *tuned("alone", rows=(8,), rates=(3e-3,), alone=FULL, seed=2),
    # Levers, and rows a step and learning rate of both sides.
    *tuned("full_plus 4, exits", *FULL_PLUS_4, *EXITS, rows=(8,), rates=(3e-3,)),
    *tuned("full_plus 4, a quarter of the exits", *FULL_PLUS_4, *SOME_EXITS, rows=(8,), rates=(3e-3,)),
    *tuned("half full", *HALF_FULL, rows=(8,), rates=(3e-3,)),
    *tuned("full_plus 4 after a fifth full", *FULL_FIRST, *FULL_PLUS_4[1:], rows=(8,), rates=(3e-3,)),
    *tuned("full_plus 4", *FULL_PLUS_4, rows=(8,), rates=(2e-3,)),
    *tuned("alone", rows=(8,), rates=(5e-3, 8e-3), alone=FULL),
    *tuned("half full", *HALF_FULL, rows=(8,), rates=(5e-3,)),
    *tuned("full_plus 4", *FULL_PLUS_4, rows=(8,), rates=(5e-3,)),
    *tuned("full_plus 4, last fifth half full", *FULL_PLUS_4, FULL_LAST, rows=(8,), rates=(3e-3,)),
    *tuned("full_plus 4", *FULL_PLUS_4, rows=(8,), rates=(3e-3,), seed=3),
    *tuned("full_plus 4, taught", *FULL_PLUS_4, *TAUGHT, rows=(8,), rates=(3e-3,)),
    *tuned("full_plus 2, warm-up 400", *FULL_PLUS_2, "optim.warmup_steps=400", rows=(8,), rates=(3e-3,), seed=2),
    *tuned("alone", rows=(16,), rates=(5e-3,), alone=FULL),
]


def run_all(trials: Sequence[Trial], workers: int) -> None:
    """Measures what is not in results.jsonl, in the order of the trials."""
    text = text_file(FOLDER).with_name("text.sha256").read_text().strip()
    waiting = [trial for trial in trials if trial.key(text) not in kept_rows()]
    print(f"{len(trials)} trials, {len(trials) - len(waiting)} of them measured before", flush=True)

    def one(trial: Trial) -> None:
        row = measure(trial, text)
        keep(row)
        print(f"{trial.name}, seed {trial.seed}: {shown(row)}", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        for done in as_completed([pool.submit(one, trial) for trial in waiting]):
            done.result()  # raises at once what a trial has raised


def shown(row: Mapping[str, Any]) -> str:
    table = row["table"]
    return ", ".join(f"{name} {table[name][0]:.3f}" for name in SHOWN if name in table) + f", mean {mean_of(row):.3f}"


def mean_of(row: Mapping[str, Any]) -> float:
    return statistics.mean(loss for loss, _ in row["table"].values())


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Returns a line for each trial: losses in nats, the mean over seeds and the largest difference between seeds."""
    by_name = defaultdict(list)
    for row in rows:
        by_name[row["trial"]].append(row)
    lines = ["| trial | seeds | M tokens | TFLOP | " + " | ".join(SHOWN) + " | mean of all | minutes |"]
    lines.append("|---|---|---|---|" + "---|" * (len(SHOWN) + 2))
    for name, same in by_name.items():
        cells = [_cell([row["table"][subnet][0] for row in same if subnet in row["table"]]) for subnet in SHOWN]
        mean = _cell([mean_of(row) for row in same]) if len(same[0]["table"]) > 1 else ""
        first = same[0]
        figures = f"{first['tokens'] / 1e6:.2f} | {first['tflop']:.1f}"
        minutes = [row["minutes"] for row in same if row["minutes"] is not None]
        time = f"{statistics.mean(minutes):.0f}" if minutes else ""
        lines.append(f"| {name} | {len(same)} | {figures} | {' | '.join(cells)} | {mean} | {time} |")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ({max(values) - min(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="names that contain one of these words (default: all)")
    parser.add_argument("--workers", type=int, default=2, help="trials that run side by side (default: 2)")
    parser.add_argument("--table", action="store_true", help="print the table of what is measured, and train nothing")
    args = parser.parse_args()
    trials = [trial for trial in TRIALS if not args.words or any(word in trial.name for word in args.words)]
    if not args.table:
        run_all(trials, args.workers)
    print(table(kept_rows().values()))


if __name__ == "__main__":
    main()
