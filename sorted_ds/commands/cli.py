"""Parses the command line of `sorted-ds`, and runs one of its commands.

In: arguments. Out: an exit code. 0 is success, 1 a defect of the program, 2 an error that the user can correct (one
line on stderr, without a traceback), and 130 means that Ctrl-C ended the command. The module of a command is imported
when the command is called, so that `--help` does not wait for torch.
"""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from sorted_ds.base.errors import UserError

INTERRUPTED = 130
EXAMPLE_RUN_FILE, EXAMPLE_RUN_DIR = "launch/runs/demo.toml", "demo/run"
LIGHT = ("select",)
"""The commands that do not use torch, except with `--any`, and so need no environment for an accelerator."""
Commands = argparse._SubParsersAction


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. For a usage error argparse exits with code 2."""
    args = _parse(_parser(), argv)
    try:
        if args.command not in LIGHT or getattr(args, "any", False):
            importlib.import_module("sorted_ds.cluster.launcher").configure_environment()
        return importlib.import_module(f"sorted_ds.commands.{args.command}").run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


def train_main() -> None:
    """Runs one rank and exits. Any launcher may start it; launch/train.py and commands/rank.py call this.

    It skips the interpreter's shutdown, in which a rank that failed under MPI would wait for all others, and which
    gloo's threads sometimes abort after all work is done.
    """
    importlib.import_module("sorted_ds.cluster.stop").listen()  # a signal may arrive during the slow imports
    parser = argparse.ArgumentParser(prog="train.py", description="Run one rank of a training run under any launcher.")
    _add_run_file(parser)
    _add_run_options(parser)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    args = _parse(parser)
    try:
        code = importlib.import_module("sorted_ds.run.train").main([str(args.run_file), *args.overrides])
    except SystemExit as system_exit:
        code = system_exit.code
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the reader may have closed it
            stream.flush()
    if not code and "mpi4py.MPI" in sys.modules:
        sys.modules["mpi4py.MPI"].Finalize()  # otherwise mpirun treats the rank as failed
    os._exit(code)


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the arguments. Overrides may also follow the options, where argparse does not recognize them."""
    args, unrecognized = parser.parse_known_args(argv)
    if unrecognized and (not hasattr(args, "overrides") or any(text.startswith("-") for text in unrecognized)):
        parser.error(f"unrecognized arguments: {' '.join(unrecognized)}")
    if unrecognized:
        args.overrides += unrecognized
    if getattr(args, "time_limit", None):
        args.overrides.append(f"train.time_limit={args.time_limit}")
    if getattr(args, "extend_space", False):
        args.overrides.append("checkpoint.extend_space=true")
    if getattr(args, "branch", None):
        args.overrides.append(f"checkpoint.branch={os.path.abspath(args.branch)}")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sorted-ds",
        description="Train one large network that holds many smaller ones, and export the one that fits your budget.",
        epilog=f"example:\n  sorted-ds plan {EXAMPLE_RUN_FILE}\n\n`sorted-ds COMMAND --help` explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sorted-ds {version('sorted-ds')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_plan(commands)
    _add_prepare(commands)
    _add_preview(commands)
    _add_sort(commands)
    _add_train(commands)
    _add_launch(commands)
    _add_eval(commands)
    _add_select(commands)
    _add_generate(commands)
    _add_export(commands)
    return parser


def _add(commands: Commands, name: str, summary: str, details: str, example: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.\n{details}",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_plan(commands: Commands) -> None:
    parser = _add(
        commands,
        "plan",
        "check a run file, and show what the run will do and cost",
        "The command trains nothing and needs no GPU.",
        f"sorted-ds plan {EXAMPLE_RUN_FILE} train.steps=1000 --ranks 8",
    )
    _add_run_file(parser)
    _add_ranks(parser)
    help_tflops = "also estimate the hours of the run, if each rank computes N TFLOP/s"
    parser.add_argument("--tflops", type=float, metavar="N", help=help_tflops)
    _add_json(parser)


def _add_prepare(commands: Commands) -> None:
    parser = _add(
        commands,
        "prepare",
        "prepare the data of a run, for example turn its text into tokens",
        "Data that is prepared already is used again. `sorted-ds train` also prepares the data.",
        f"sorted-ds prepare {EXAMPLE_RUN_FILE}",
    )
    _add_run_file(parser)
    _add_run_options(parser)  # the job scripts pass the arguments of `train` to `prepare`
    _add_json(parser)


def _add_preview(commands: Commands) -> None:
    parser = _add(
        commands,
        "preview",
        "print the first rows that a run trains on",
        "What is learned is coloured, and the beginnings of documents are marked. Data is prepared if necessary.",
        f"sorted-ds preview {EXAMPLE_RUN_FILE} --rows 2",
    )
    _add_run_file(parser)
    parser.add_argument("--rows", type=_positive, default=4, metavar="N", help="number of rows (default: 4)")
    _add_json(parser)


def _add_sort(commands: Commands) -> None:
    parser = _add(
        commands,
        "sort",
        "put the important units of a pre-trained model first",
        "The full network computes the same as before. Its important attention groups and channels come first, and\n"
        'sorted.json gets an order of its layers, which a run file takes with space.layer_order = "model".',
        "sorted-ds sort path/to/model --text docs --out path/to/sorted",
    )
    parser.add_argument("model", metavar="HF_DIR", help="a Hugging Face directory or hub id")
    parser.add_argument("--out", type=Path, required=True, help="directory to write, which must not exist")
    text = "text files, and folders of them, to measure importance and losses on"
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="PATH", help=text)
    files = 'JSONL or parquet files with "text", and whatever data.files takes'
    parser.add_argument("--files", "--jsonl", nargs="+", default=[], metavar="PATH", help=files)
    text = "names of the files that are read in folders (default: .txt .md)"
    parser.add_argument("--suffixes", nargs="+", default=[".txt", ".md"], metavar="SUFFIX", help=text)
    parser.add_argument("--row-tokens", type=_positive, default=0, metavar="N", help="tokens of a row (default: 256)")
    text = "tokens on which importance is measured (default: 4096)"
    parser.add_argument("--tokens", type=_positive, default=4096, metavar="N", help=text)
    text = "tokens on which the loss without a layer is measured (default: 1024)"
    parser.add_argument("--order-tokens", type=_positive, default=1024, metavar="N", help=text)
    text = "the fewest layers that the order keeps (default: half of them)"
    parser.add_argument("--fewest-layers", type=_positive, default=0, metavar="N", help=text)
    _add_json(parser)


def _add_train(commands: Commands) -> None:
    parser = _add(
        commands,
        "train",
        "train on this machine, with the deepspeed launcher",
        "The run resumes from its last checkpoint, if it has one. After Ctrl-C, SIGTERM or SIGUSR1 it ends the step,\n"
        "saves and stops; another Ctrl-C kills it.",
        f"sorted-ds train {EXAMPLE_RUN_FILE} optim.learning_rate=1e-3 --ranks 2",
    )
    _add_run_file(parser)
    _add_ranks(parser)
    _add_run_options(parser)


def _add_launch(commands: Commands) -> None:
    parser = _add(
        commands,
        "launch",
        "train as a job of a Slurm cluster",
        "The command writes the job's script into the run's directory, submits it, and prints how to follow the job.\n"
        "A job that is preempted or reaches its time limit saves, is started again, and resumes.",
        "sorted-ds launch slurm my.toml --nodes 2 --gpus-per-node 8 --time 1-00:00:00",
    )
    parser.add_argument("cluster", choices=("slurm",), metavar="slurm", help="the scheduler of the cluster")
    _add_run_file(parser)
    parser.add_argument("--nodes", type=_positive, default=1, metavar="N", help="number of nodes (default: 1)")
    help_ranks = "number of ranks on a node, each of which uses one GPU (default: 8)"
    parser.add_argument("--gpus-per-node", type=_positive, default=8, metavar="N", help=help_ranks)
    parser.add_argument("--no-gpus", action="store_true", help="run these ranks on CPUs")
    parser.add_argument("--time", default="24:00:00", metavar="TIME", help="time limit of the job (default: 24:00:00)")
    help_sbatch = "another option of sbatch, like --sbatch=--partition=a100; --sbatch can be repeated"
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help=help_sbatch)
    parser.add_argument("--after", metavar="JOB", help="start after this job has ended, with or without success")
    parser.add_argument("--dry-run", action="store_true", help="write the script, but do not submit it")
    _add_run_options(parser)


def _add_eval(commands: Commands) -> None:
    parser = _add(
        commands,
        "eval",
        "measure sub-networks on the validation rows",
        "The command prints the table, and writes it to subnets.json, model/sorted.json and, as a figure, pareto.png.\n"
        "--measure adds times and memory, and --tasks adds scores in the tasks of lm_eval. With either, losses that\n"
        "the table already has are kept, unless --rows is given.",
        f"sorted-ds eval {EXAMPLE_RUN_DIR} --subnets d6-g4-f384,d2-g1-f96\n"
        f"  sorted-ds eval {EXAMPLE_RUN_DIR} --measure --batch 1,8 --context 128,512\n"
        f"  sorted-ds eval {EXAMPLE_RUN_DIR} --tasks arc_easy,piqa --limit 500",
    )
    _add_dir(parser)
    parser.add_argument("--subnets", metavar="NAME,NAME", help="measure only these sub-networks (default: all)")
    parser.add_argument("--rows", type=_positive, metavar="N", help="number of validation rows (default: eval.rows)")
    _add_device(parser)
    text = "also measure the time of prefill and decoding and the memory, on the device"
    parser.add_argument("--measure", action="store_true", help=text)
    text = "with --measure: numbers of rows that are decoded together (default: 1)"
    parser.add_argument("--batch", type=_positives, metavar="N,N", help=text)
    text = "with --measure: numbers of tokens that a decoded token attends to (default: 512)"
    parser.add_argument("--context", type=_positives, metavar="N,N", help=text)
    text = "also score in these tasks of lm_eval: names, groups, or YAML files; needs sorted-ds[eval]"
    parser.add_argument("--tasks", metavar="TASK,TASK", help=text)
    text = "with --tasks: a folder of YAML files that define more tasks"
    parser.add_argument("--include-path", type=Path, metavar="DIR", help=text)
    text = "with --tasks: number of questions of each task (default: all)"
    parser.add_argument("--limit", type=_positive, metavar="N", help=text)
    text = "with --tasks: number of examples before each question (default: the task's own)"
    parser.add_argument("--num-fewshot", type=_natural, metavar="N", help=text)
    text = "with --tasks: put the questions into the tokenizer's chat template"
    parser.add_argument("--apply-chat-template", action="store_true", help=text)
    _add_json(parser)


def _add_select(commands: Commands) -> None:
    parser = _add(
        commands,
        "select",
        "find the best measured sub-network within a budget",
        "The command looks it up in the measured table. It prints the name on stdout and the reason on stderr. Within\n"
        "costs it takes the lowest loss. With --max-loss-gap or --min-accuracy it takes the cheapest: in the first of\n"
        "latency, memory, FLOPs and parameters that has a budget, or in parameters.",
        f"sorted-ds select {EXAMPLE_RUN_DIR} --max-params 1.5M\n"
        f"  sorted-ds select {EXAMPLE_RUN_DIR} --max-latency-ms 20 --max-memory-gib 0.005",
    )
    _add_dir(parser)
    parser.add_argument("--max-params", metavar="N", help="largest number of parameters, like 2.5B, 300M or 1e6")
    parser.add_argument("--max-flops", metavar="N", help="largest number of forward FLOPs per token, like 5G")
    text = "longest time of a decoded token, which `sorted-ds eval --measure` measures"
    parser.add_argument("--max-latency-ms", type=float, metavar="MS", help=text)
    text = "largest memory of the exported model's weights and cache, also from --measure"
    parser.add_argument("--max-memory-gib", type=float, metavar="GIB", help=text)
    text = "largest loss above the full network's; takes the cheapest"
    parser.add_argument("--max-loss-gap", type=float, metavar="NATS", help=text)
    text = "lowest accuracy, from 0 to 1; takes the cheapest"
    parser.add_argument("--min-accuracy", type=float, metavar="SHARE", help=text)
    text = "rows that are decoded together, for latency and memory (default: 1)"
    parser.add_argument("--batch", type=_positive, metavar="N", help=text)
    text = "tokens that a decoded token attends to, for latency and memory (default: 512)"
    parser.add_argument("--context", type=_positive, metavar="N", help=text)
    text = "also evaluate at most ten sub-networks that were never trained, and add them to the table"
    parser.add_argument("--any", action="store_true", help=text)
    _add_json(parser)


def _add_generate(commands: Commands) -> None:
    parser = _add(
        commands,
        "generate",
        "write text with a sub-network, with or without a draft",
        "The text of a single prompt appears while it is written. With --draft a smaller sub-network proposes tokens,\n"
        "and the one that writes keeps those that it would have written itself.",
        f'sorted-ds generate {EXAMPLE_RUN_DIR} --prompt "def " --subnet d6-g4-f384 --draft d2-g4-f384',
    )
    _add_dir(parser)
    text = "a prompt; - reads one from standard input; can be repeated"
    parser.add_argument("--prompt", action="append", required=True, metavar="TEXT", help=text)
    parser.add_argument("--subnet", metavar="NAME", help="the sub-network that writes (default: the full network)")
    text = "a smaller sub-network that proposes tokens; auto tries a few, and takes the fastest or none"
    parser.add_argument("--draft", metavar="NAME|auto", help=text)
    text = "tokens of a draft (default: a number that follows how many are kept)"
    parser.add_argument("--draft-tokens", type=_positive, metavar="N", help=text)
    text = "most tokens that are written for a prompt (default: 128)"
    parser.add_argument("--max-new-tokens", type=_positive, default=128, metavar="N", help=text)
    text = "0 takes the likeliest tokens; above 0 they are drawn at random (default: 0)"
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help=text)
    text = "draw from the likeliest tokens with this probability together"
    parser.add_argument("--top-p", type=float, metavar="P", help=text)
    parser.add_argument("--top-k", type=_positive, metavar="K", help="draw from this number of the likeliest tokens")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random draws (default: 0)")
    parser.add_argument("--chat", action="store_true", help="take the prompts as messages of a user")
    _add_device(parser)
    _add_json(parser)


def _add_export(commands: Commands) -> None:
    parser = _add(
        commands,
        "export",
        "write a sub-network as an ordinary Hugging Face model directory",
        "The command compares the logits with those of the full network's sub-network, and writes nothing if they\n"
        "differ. It prints the path of the directory.",
        f"sorted-ds export {EXAMPLE_RUN_DIR} --subnet d4-g2-f96 --out exported/small",
    )
    _add_dir(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--subnet", metavar="NAME", help="export this sub-network")
    which.add_argument("--all", action="store_true", help="export every sub-network, into OUT/NAME")
    parser.add_argument("--out", type=Path, required=True, help="directory to write, which must not exist")
    parser.add_argument("--store-logits", action="store_true", help="also write logits.safetensors, for a comparison")


def _add_run_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_file", type=Path, metavar="RUN.toml", help="the run file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace a key of the run file")


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    text = "number of processes, one for each GPU (default: the number of GPUs, or 1)"
    parser.add_argument("--ranks", type=_positive, metavar="N", help=text)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    text = "save and stop before this time has passed, like 90 (minutes) or 1:30:00 (default: train.time_limit)"
    parser.add_argument("--time-limit", metavar="TIME", help=text)
    text = "resume with the same weights after the space has grown (checkpoint.extend_space)"
    parser.add_argument("--extend-space", action="store_true", help=text)
    text = "start from this checkpoint of another run, with its optimizer state (checkpoint.branch)"
    parser.add_argument("--branch", metavar="RUN_DIR@STEP", help=text)


def _add_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", type=Path, metavar="DIR", help="directory of a run, or the model directory in it")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")


def _positives(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _positive(text: str) -> int:
    return _at_least(1, text)


def _natural(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    with suppress(ValueError):
        if (number := int(text)) >= least:
            return number
    raise argparse.ArgumentTypeError(f"{text!r} should be a whole number of at least {least}")
