"""The command line: `sorted-ds plan | prepare | train | launch | eval | select | export`.

In: arguments. Out: an exit code: 0, 1 for a failure of the program, 2 for what the user can mend (one line on stderr,
no traceback), 130 after Ctrl-C. Each command's work is in `commands/`, imported when it is called: `--help` loads no
torch.
"""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sorted_ds.base.errors import UserError

INTERRUPTED = 130
LIGHT = ("select",)
"""Commands that need no torch, so no accelerator."""
Commands = argparse._SubParsersAction


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Usage errors leave through argparse with code 2."""
    args = _parse(_parser(), argv)
    try:
        if args.command not in LIGHT:
            importlib.import_module("sorted_ds.cluster.launcher").configure_environment()
        return importlib.import_module(f"sorted_ds.commands.{args.command}").run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


def train_main() -> None:
    """One rank, started by any launcher: what launch/train.py calls. deepspeed adds --local_rank=N, which we know.

    Leaves without the interpreter's shutdown: under MPI a rank that fails would wait in it for all others, and gloo's
    threads sometimes abort it, after all is done.
    """
    importlib.import_module("sorted_ds.cluster.stop").listen()  # before the slow imports: a signal may come in them
    parser = argparse.ArgumentParser(prog="train.py", description="One rank of a run, started by any launcher.")
    _add_run_file(parser)
    _add_life(parser)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    args = _parse(parser)
    try:
        code = importlib.import_module("sorted_ds.run.train").main([str(args.run_file), *args.overrides])
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody may be there to read it
            stream.flush()
    if not code and "mpi4py.MPI" in sys.modules:
        sys.modules["mpi4py.MPI"].Finalize()  # or mpirun takes the rank for one that failed
    os._exit(code)


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Overrides may also follow the flags: argparse leaves those over."""
    args, left = parser.parse_known_args(argv)
    if left and (not hasattr(args, "overrides") or any(text.startswith("-") for text in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        args.overrides += left
    if getattr(args, "time_limit", None):
        args.overrides.append(f"train.time_limit={args.time_limit}")
    if getattr(args, "extend_space", False):
        args.overrides.append("checkpoint.extend_space=true")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sorted-ds",
        description="Train one large language model that holds many smaller ones, and take out the one that fits.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_plan(commands)
    _add_prepare(commands)
    _add_train(commands)
    _add_launch(commands)
    _add_eval(commands)
    _add_select(commands)
    _add_export(commands)
    return parser


def _add(commands: Commands, name: str, does: str, more: str, example: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=does,
        description=f"{does[0].upper()}{does[1:]}. {more}",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_plan(commands: Commands) -> None:
    parser = _add(
        commands,
        "plan",
        "show and check what a run will cost, before it costs anything",
        "Trains nothing, needs no GPU.",
        "sorted-ds plan launch/runs/demo.toml train.steps=1000 --ranks 8",
    )
    _add_run_file(parser)
    _add_ranks(parser)
    help_tflops = "TFLOP/s that one rank is expected to reach: prints the hours (default: no estimate)"
    parser.add_argument("--tflops", type=float, metavar="N", help=help_tflops)
    _add_json(parser)


def _add_prepare(commands: Commands) -> None:
    parser = _add(
        commands,
        "prepare",
        "turn a run's text into tokens on disk",
        "Does nothing where they are there already. `train` prepares by itself.",
        "sorted-ds prepare launch/runs/demo.toml",
    )
    _add_run_file(parser)
    _add_life(parser)  # the job scripts hand on what `train` gets
    _add_json(parser)


def _add_train(commands: Commands) -> None:
    parser = _add(
        commands,
        "train",
        "train on this machine, through the deepspeed launcher",
        "Goes on from the run's last checkpoint.\nOn Ctrl-C, SIGTERM or SIGUSR1 the step ends and is saved; a "
        "Ctrl-C after it kills.",
        "sorted-ds train launch/runs/demo.toml optim.learning_rate=1e-3 --ranks 2",
    )
    _add_run_file(parser)
    _add_ranks(parser)
    _add_life(parser)


def _add_launch(commands: Commands) -> None:
    parser = _add(
        commands,
        "launch",
        "train as a job of a Slurm cluster",
        "Writes the job's script into the run's directory, submits it, and says how to follow it.\nPreempted or at its "
        "time limit, the job saves, is started again, and goes on.",
        "sorted-ds launch slurm my.toml --nodes 2 --gpus-per-node 8 --time 1-00:00:00",
    )
    parser.add_argument("cluster", choices=("slurm",), metavar="slurm", help="what the cluster is run by")
    _add_run_file(parser)
    parser.add_argument("--nodes", type=_positive, default=1, metavar="N", help="nodes (default: 1)")
    help_ranks = "ranks on a node, each with a GPU (default: 8)"
    parser.add_argument("--gpus-per-node", type=_positive, default=8, metavar="N", help=help_ranks)
    parser.add_argument("--no-gpus", action="store_true", help="as many ranks, on CPUs")
    parser.add_argument("--time", default="24:00:00", metavar="TIME", help="time limit (default: 24:00:00)")
    help_sbatch = "any other option of sbatch, like --sbatch=--partition=a100; may be given again"
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help=help_sbatch)
    parser.add_argument("--after", metavar="JOB", help="start when this job has ended, however it did")
    parser.add_argument("--dry-run", action="store_true", help="write the script, submit nothing")
    _add_life(parser)


def _add_eval(commands: Commands) -> None:
    parser = _add(
        commands,
        "eval",
        "measure sub-networks on the validation rows",
        "Writes subnets.json, pareto.png and the table in model/sorted.json.",
        "sorted-ds eval demo/run --subnets d8-g4-f384,d2-g1-f96",
    )
    _add_dir(parser)
    parser.add_argument("--subnets", metavar="NAME,NAME", help="these alone (default: all of the space)")
    parser.add_argument("--rows", type=_positive, metavar="N", help="validation rows (default: the run's eval.rows)")
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU where there is one)")
    _add_json(parser)


def _add_select(commands: Commands) -> None:
    parser = _add(
        commands,
        "select",
        "name the best measured sub-network within a budget",
        "A look-up in the measured table. Prints the name alone on stdout, the reason on stderr.",
        "sorted-ds select demo/run --max-params 1.5M",
    )
    _add_dir(parser)
    parser.add_argument("--max-params", metavar="N", help="parameters at most, like 2.5B, 300M or 1e6")
    parser.add_argument("--max-flops", metavar="N", help="forward FLOPs per token at most, like 5G")
    _add_json(parser)


def _add_export(commands: Commands) -> None:
    parser = _add(
        commands,
        "export",
        "write a sub-network as an ordinary Hugging Face model directory",
        "Refuses to write when its logits differ from the nested model's. Prints the path.",
        "sorted-ds export demo/run --subnet d4-g2-f96 --out exported/small",
    )
    _add_dir(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--subnet", metavar="NAME", help="which one")
    which.add_argument("--all", action="store_true", help="each of the space, into OUT/NAME")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; must not exist")
    parser.add_argument("--store-logits", action="store_true", help="also write logits.safetensors, to compare with")


def _add_run_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_file", type=Path, metavar="RUN.toml", help="the run file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys of the run file to replace")


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    text = "processes, one per GPU (default: the number of GPUs, else 1)"
    parser.add_argument("--ranks", type=_positive, metavar="N", help=text)


def _add_life(parser: argparse.ArgumentParser) -> None:
    text = "save and end before so long has passed, like 90 (minutes) or 1:30:00 (default: train.time_limit)"
    parser.add_argument("--time-limit", metavar="TIME", help=text)
    text = "go on from checkpoints whose space is a part of this one, with the same weights"
    parser.add_argument("--extend-space", action="store_true", help=text)


def _add_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", type=Path, metavar="DIR", help="the run's directory, or the model directory in it")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable output on stdout")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number
