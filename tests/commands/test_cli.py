"""The command line: exit codes, one-line errors, what is on stdout and what on stderr."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sorted_ds.base.errors import UserError
from sorted_ds.cluster.launcher import launch, launch_environment
from sorted_ds.commands.cli import main
from sorted_ds.deploy.model_dir import ModelDir
from tests.launched import hears_all
from tests.runs import run_file
from tests.trained import made_up_table, measured_run, trained_run

COMMANDS = ["plan", "prepare", "preview", "sort", "train", "launch", "eval", "select", "generate", "export"]
ROOT = Path(__file__).parents[2]


def in_a_process(*arguments: str, **kwargs) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-c",
        "import sys; from sorted_ds.commands.cli import main; sys.exit(main())",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, **kwargs)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"example:\n  sorted-ds {command} " in capsys.readouterr().out


def test_help_lists_exactly_the_commands_that_are_built(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert listed == COMMANDS


def test_help_loads_no_torch():
    script = """
import contextlib, io, sys
from sorted_ds.commands.cli import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main(["train", "--help"])
heavy = {"torch", "transformers", "pydantic", "rich", "matplotlib"} & sys.modules.keys()
sys.exit(f"loaded {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert main(["select", str(tmp_path), "--max-params", "1M"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["select"], ["nothing"], ["plan", "a.toml", "--wrong"], ["train", "a.toml", "--ranks", "0"]]
)
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2


def test_ctrl_c_is_exit_code_130(monkeypatch, tmp_path):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ModelDir, "find", interrupted)
    assert main(["select", str(tmp_path), "--max-params", "1M"]) == 130


def test_select_prints_the_name_alone_on_stdout(tmp_path, capsys):
    run = measured_run(tmp_path)
    capsys.readouterr()
    budget = sorted(row.parameters for row in made_up_table())[5]
    assert main(["select", str(run), "--max-params", str(budget)]) == 0
    printed = capsys.readouterr()
    fitting = [row for row in made_up_table() if row.parameters <= budget]
    assert printed.out == min(fitting, key=lambda row: row.loss).subnet + "\n"
    assert "has the lowest loss within the budget" in printed.err


def test_select_as_json_is_the_whole_row(tmp_path, capsys):
    run = measured_run(tmp_path)
    capsys.readouterr()
    assert main(["select", str(run), "--max-flops", "1G", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["subnet"] == "d4-g4-f112"
    assert row["loss"] == min(row.loss for row in made_up_table())


def test_export_prints_the_path_alone_on_stdout(tmp_path):
    run, out = trained_run(tmp_path / "run"), tmp_path / "out"
    env = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    done = in_a_process("export", str(run), "--subnet", "d1-g1-f32", "--out", str(out), env=env)
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    assert (out / "model.safetensors").is_file()


def test_export_all_writes_each_sub_network(tmp_path, capsys):
    run = trained_run(tmp_path / "run")
    capsys.readouterr()
    assert main(["export", str(run), "--all", "--out", str(tmp_path / "all")]) == 0
    names = set(ModelDir.find(run).read().space)
    assert {path.name for path in (tmp_path / "all").iterdir()} == names
    assert len(capsys.readouterr().out.splitlines()) == len(names)


def test_plan_prints_the_table_and_as_json_every_number(tmp_path, capsys):
    path = run_file(tmp_path)
    assert main(["plan", str(path), "--ranks", "2", "train.steps=50"]) == 0
    printed = capsys.readouterr().out
    assert "d1-g1-f32" in printed
    assert "warning: 8 of 8 sub-networks" in printed
    assert main(["plan", str(path), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["subnets"]) == 8
    assert (plan["steps"], plan["subnets_per_step"], plan["rows_per_subnet"]) == (400, 4, 2)


def test_prepare_then_eval_measures_a_directory(tmp_path, capsys):
    path = run_file(tmp_path)
    assert main(["prepare", str(path), "--json"]) == 0
    prepared = json.loads(capsys.readouterr().out)
    run = trained_run(tmp_path / "run", tokens_dir=prepared["tokens_dir"], vocab_size=prepared["vocab_size"])
    assert main(["eval", str(run), "--json"]) == 0
    evaluation = json.loads(capsys.readouterr().out)
    assert len(evaluation["measured"]) == 27
    assert {row["num_targets"] for row in evaluation["measured"]} == {8 * 16}
    assert list(evaluation["baseline"]) == ["unigram model"]
    assert 0 < evaluation["baseline"]["unigram model"] < 6
    assert {"loss", "perplexity", "accuracy"} < evaluation["measured"][0].keys()
    assert (run / "pareto.png").stat().st_size > 10_000
    assert main(["eval", str(run), "--subnets", "d1-g1-f32"]) == 0
    printed = capsys.readouterr()
    assert "unigram model" in printed.out
    assert printed.out.count("-g") == 27
    assert "…" not in printed.out
    written = json.loads((run / "subnets.json").read_text())
    assert written == {"baseline": evaluation["baseline"], "subnets": evaluation["measured"]}


RANK = """
import os, signal, sys, time
stopped = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: stopped.append(signal.Signals(number).name))
# One write a line: deepspeed starts ranks unbuffered, and two of them would mix the pieces of a print.
sys.stdout.write(f"started {os.environ['RANK']} of {os.environ['WORLD_SIZE']} {sys.argv[1:]}\\n")
if sys.argv[1] == "leave":
    sys.exit(int(sys.argv[2]))
while not stopped:
    time.sleep(0.05)
time.sleep(2)
sys.stdout.write(f"saved {os.environ['RANK']} {stopped}\\n")
"""


@pytest.fixture
def rank_module(tmp_path, monkeypatch):
    (tmp_path / "stand_in_rank.py").write_text(RANK)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return "stand_in_rank"


@pytest.mark.parametrize("code", [0, 2])
def test_the_launcher_starts_the_ranks_and_hands_back_their_code(rank_module, code, capfd):
    assert launch([rank_module, "leave", str(code)], 2) == code
    lines = sorted(line for line in capfd.readouterr().out.splitlines() if line.startswith("started"))
    assert lines == [f"started {rank} of 2 ['leave', '{code}']" for rank in range(2)]


TERM, INT, USR1, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP


@pytest.mark.parametrize(
    ("sent", "got"),
    [
        ([TERM], ["SIGTERM"]),
        pytest.param([INT], ["SIGINT"], marks=pytest.mark.long),
        pytest.param([INT, INT], ["SIGINT", "SIGINT"], marks=pytest.mark.long),  # at once: one key, passed on by two
        pytest.param([USR1, TERM], ["SIGUSR1", "SIGTERM"], marks=pytest.mark.long),  # as Slurm does at a time limit
        ([HUP, HUP], ["SIGINT", "SIGINT"]),  # as a terminal that is closed does
    ],
)
def test_a_signal_lets_every_rank_save(rank_module, sent, got):
    left = _left_after(rank_module, sent, seconds=0.1)
    assert left == (0, [f"saved {rank} {got}" for rank in (0, 1)])


def test_a_ctrl_c_after_the_first_signal_kills(rank_module):
    assert _left_after(rank_module, [TERM, INT], seconds=1.2) == (137, [])


def test_what_nohup_hides_ends_nothing(rank_module):
    assert _left_after(rank_module, [HUP, TERM], 0.5, "nohup") == (0, [f"saved {rank} ['SIGTERM']" for rank in (0, 1)])


def _left_after(rank_module, sent, seconds, *before):
    """The exit code, and what the ranks said after signals in so many seconds."""
    script = f"from sorted_ds.cluster.launcher import launch; raise SystemExit(launch(['{rank_module}', 'stay'], 2))"
    command = [*before, sys.executable, "-c", script]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=hears_all)
    assert process.stdout is not None
    started = [process.stdout.readline() for _ in range(2)]
    assert all(line.startswith("started") for line in started)
    for number in sent:
        process.send_signal(number)
        time.sleep(seconds)
    left, _ = process.communicate(timeout=60)
    return process.returncode, sorted(left.splitlines())


def test_more_ranks_than_gpus_are_refused_with_what_works(monkeypatch):
    monkeypatch.setattr("sorted_ds.cluster.launcher.num_devices", lambda: 2)
    with pytest.raises(UserError, match=r"this machine shows 2 GPUs\. Set --ranks to (\d) or less,") as refused:
        launch_environment(3)
    works = int(re.search(r"--ranks to (\d)", str(refused.value))[1])
    assert launch_environment(works)[0]["CUDA_VISIBLE_DEVICES"] == "0,1"
