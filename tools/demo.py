"""Runs the demo: trains one network on the Python standard library, then exports a small one. `make demo` runs it.

In: the modules of the interpreter's standard library. On disk: demo/ with the text, the run and the exported model. The
demo trains a SentencePiece tokenizer on the text, and the network on two ranks under the deepspeed launcher with ZeRO.
It evaluates every sub-network, selects one by a budget, exports it, and loads it with plain transformers in a process
that cannot import sorted_ds. It fails if a result is not what README promises.
"""

import json
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from sorted_ds.cluster.launcher import num_devices
from sorted_ds.deploy.model_dir import PARETO_PNG, SUBNETS_JSON

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "demo"
RUN_FILE = "launch/runs/demo.toml"
RUN_DIR = "demo/run"
FOLDERS_LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "pydoc_data", "turtledemo"}
BUDGET = "700k"
"""The largest number of parameters of the exported sub-network."""
RANKS = 2
"""A machine with one GPU runs one rank."""
NATS_UNDER_UNIGRAM = 1.0
"""The worst sub-network has a loss that is lower than the unigram model's by at least this."""
LARGEST_CORRELATION = -0.9
"""The largest rank correlation of parameters and loss."""
FULL_WITHIN = 0.02
"""The largest relative difference between the loss of the full network and the lowest loss."""


def main() -> None:
    start = time.perf_counter()
    copy_standard_library()
    run("sorted-ds", "train", RUN_FILE, "--ranks", str(min(RANKS, num_devices() or RANKS)))
    check_table(json.loads((ROOT / RUN_DIR / SUBNETS_JSON).read_text()))
    name = run("sorted-ds", "select", RUN_DIR, "--max-params", BUDGET, capture=True).strip()
    print(name)
    out = f"demo/{name}"
    shutil.rmtree(ROOT / out, ignore_errors=True)
    run("sorted-ds", "export", RUN_DIR, "--subnet", name, "--out", out, "--store-logits")
    run("python", "tools/check_export.py", out, "def __init__(self, ")
    print(f"\n{cost_of(json.loads(run('sorted-ds', 'plan', RUN_FILE, '--json', capture=True)))}")
    print(f"figure:      {RUN_DIR}/{PARETO_PNG}")
    print(f"curves:      tensorboard --logdir {RUN_DIR}/tensorboard")
    print(f"sub-network: {out}, an ordinary Hugging Face model")
    print(f"The demo took {time.perf_counter() - start:.0f} s, not counting the installation.")


def copy_standard_library() -> None:
    """Copies the modules of the standard library to demo/text, without tests and generated tables."""
    source, target = Path(sysconfig.get_paths()["stdlib"]), DEMO / "text"
    shutil.rmtree(target, ignore_errors=True)
    for path in sorted(source.rglob("*.py")):
        inside = path.relative_to(source)
        if not FOLDERS_LEFT_OUT & set(inside.parts) and is_utf8(path):
            (target / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / inside)
    files = list(target.rglob("*.py"))
    print(f"text: {len(files)} files, {sum(f.stat().st_size for f in files) / 1e6:.1f} MB of {source}", flush=True)


def is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def run(program: str, *arguments: str, capture: bool = False) -> str:
    """Prints and runs a command of README. Returns its output if `capture` is set, otherwise an empty string."""
    print(f"\n$ {shlex.join([program, *arguments])}", flush=True)
    path = sys.executable if program == "python" else str(Path(sys.executable).parent / program)
    done = subprocess.run(
        [path, *arguments], cwd=ROOT, stdout=subprocess.PIPE if capture else None, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"error: the demo stopped, because {program} ended with exit code {done.returncode}.")
    return done.stdout or ""


def check_table(table: dict) -> None:
    """Checks what README promises of the trained network, and exits with an error if it is not so."""
    rows = table["subnets"]
    losses = [row["loss"] for row in rows]
    margin = table["baseline"]["unigram model"] - max(losses)
    correlation = rank_correlation([row["parameters"] for row in rows], losses)
    over_best = losses[-1] / min(losses) - 1
    smallest = rows[0]["non_embedding_parameters"] / rows[-1]["non_embedding_parameters"]
    print(f"\n{len(rows)} sub-networks: the smallest has {smallest:.1%} of the full one's non-embedding parameters.")
    print(f"The highest loss is {margin:.2f} nats below the unigram model's (at least {NATS_UNDER_UNIGRAM}).")
    print(f"The rank correlation of parameters and loss is {correlation:.3f} (at most {LARGEST_CORRELATION}).")
    print(f"The loss of the full network is {over_best:.2%} above the lowest one (at most {FULL_WITHIN:.0%}).")
    if margin < NATS_UNDER_UNIGRAM or correlation > LARGEST_CORRELATION or over_best > FULL_WITHIN:
        sys.exit("error: the trained network is not what README promises. Please report this.")


def cost_of(plan: dict) -> str:
    """Returns a line that says what the family cost, and what its sizes would have cost alone."""
    flops, num = plan["flops"], len(plan["subnets"])
    spent = flops["sampled"] + flops["teacher"] + flops["exits"] - flops["dropped"]
    alone = f"{flops['each_alone'] / 1e12:,.0f} TFLOP, {flops['each_alone'] / spent:.0f} times as much"
    return (
        f"The family of {num} cost {spent / 1e12:,.0f} TFLOP. Each size alone on the same tokens costs {alone}, "
        f"and the full network alone {flops['full_alone'] / 1e12:,.0f}."
    )


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Returns Spearman's rank correlation."""
    ranks = [[sorted(values).index(value) for value in values] for values in (a, b)]
    means = [sum(values) / len(values) for values in ranks]
    x, y = ([value - mean for value in values] for values, mean in zip(ranks, means, strict=True))
    covariance = sum(i * j for i, j in zip(x, y, strict=True))
    return covariance / (sum(i * i for i in x) * sum(j * j for j in y)) ** 0.5


if __name__ == "__main__":
    main()
