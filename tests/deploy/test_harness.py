"""Scores in the tasks of lm_eval: those of a view are those that lm_eval itself gives for the export."""

import functools
import json
import sys

import lm_eval
import lm_eval.tasks
import pytest
from lm_eval.models.huggingface import HFLM

from sorted_ds import UserError, load
from sorted_ds.commands.cli import main
from sorted_ds.deploy.export import export
from sorted_ds.deploy.harness import Harness, Tasks, score_family, scores_of
from sorted_ds.deploy.model_dir import ModelDir
from tests.trained import measured_run

NAMES = ("d1-g1-f32", "d2-g3-f80", "d4-g4-f112")
CHOICE = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS, train: QUESTIONS}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["a", "bc", "x y"]
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
TEXT = """
task: whole
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
"""
WRITTEN = """
task: written
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "a"
generation_kwargs: {max_gen_toks: 4, until: ["~"]}
metric_list: [{metric: exact_match}]
filter_list: [{name: first, filter: [{function: take_first}]}]
"""
BOTH = """
group: both
task: [letters, written]
aggregate_metric_list: [{metric: acc, filter_list: none}]
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with three tasks and a group, on forty questions in a local file. lm_eval's own 14,000 are not read."""
    manager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    questions = folder / "questions.jsonl"
    lines = [{"question": f"number {n * n}: ", "answer": n % 3} for n in range(40)]
    questions.write_text("\n".join(map(json.dumps, lines)))
    for name, text in {"letters": CHOICE, "whole": TEXT, "written": WRITTEN, "both": BOTH}.items():
        (folder / f"{name}.yaml").write_text(text.replace("QUESTIONS", str(questions)))
    return folder


@pytest.mark.parametrize("limit", [None, 7])
def test_scores_are_those_of_lm_eval_on_the_export(tasks, tmp_path, limit):
    run, wanted = measured_run(tmp_path / "run"), ("letters", "whole", "written")
    harness = Harness(load(run), Tasks(wanted, include_path=tasks, limit=limit, num_fewshot=2))
    family = harness.family
    score_family(harness, [family.find(name) for name in NAMES])
    rows = {row.subnet: row.scores for row in load(run).table}
    assert {name for name, scores in rows.items() if scores} == set(NAMES)
    for name in NAMES:
        out = tmp_path / name
        export(run, [name], [out])
        model = HFLM(pretrained=str(out), device="cpu", batch_size=3)
        manager = lm_eval.tasks.TaskManager(include_path=str(tasks))
        found = lm_eval.simple_evaluate(model, tasks=list(wanted), limit=limit, num_fewshot=2, task_manager=manager)
        expected = {score.name: score for score in scores_of(found, False, rows[name][0].lm_eval)}
        assert [score.name for score in rows[name]] == sorted(expected)
        assert {score.task for score in rows[name]} == set(wanted)
        for score in rows[name]:
            assert score.terms == expected[score.name].terms
            assert score.num_samples == (limit or 40)
            assert score.value == pytest.approx(expected[score.name].value, rel=1e-5)
    values = [[score.value for score in rows[name]] for name in NAMES]
    assert values[0] != values[1] != values[2]


def test_the_command_prints_a_table_for_what_was_asked_and_keeps_other_scores(tasks, tmp_path, capsys):
    run = str(measured_run(tmp_path / "run"))
    given = ["eval", run, "--subnets", ",".join(NAMES[:2]), "--include-path", str(tasks)]
    assert main([*given, "--tasks", "letters"]) == 0
    assert main([*given, "--tasks", "both", "--limit", "5"]) == 0
    printed = capsys.readouterr().out
    assert "letters: 40 questions, 0 examples before each, lm_eval 0." in printed
    assert "both: 10 questions" in printed
    scores = ModelDir.find(tmp_path / "run").table()[0].scores
    assert {score.name: score.num_samples for score in scores} == {
        ("both", "acc"): 10,
        ("letters", "acc"): 5,
        ("letters", "acc_norm"): 5,
        ("written", "exact_match,first"): 5,
    }
    assert main(["eval", run, "--subnets", NAMES[2], "--include-path", str(tasks), "--tasks", "letters"]) == 0
    table = {row.subnet: {score.task for score in row.scores} for row in ModelDir.find(tmp_path / "run").table()}
    assert [table[name] for name in NAMES] == [{"both", "written"}, {"both", "written"}, {"letters"}]


def test_what_cannot_be_run_is_one_line(tasks, tmp_path, capsys, monkeypatch):
    run = str(measured_run(tmp_path / "run"))
    (tasks / "gone.yaml").write_text(CHOICE.replace("letters", "gone").replace("QUESTIONS", "/no/such/file.jsonl"))
    (tasks / "wrong.yaml").write_text(TEXT.replace("{{question}}", "{{no_field}}"))
    for given, expected in (
        (["--tasks", "arc_hard"], "lm_eval cannot run arc_hard: \"Spec 'arc_hard' is not a registered task"),
        (["--tasks", "gone", "--include-path", str(tasks)], "lm_eval cannot run gone: Unable to find '/no/such/file"),
        (["--limit", "5"], "Add --tasks."),
        (["--tasks", "letters", "--apply-chat-template"], "has no chat template"),
    ):
        assert main(["eval", run, *given]) == 2
        error = capsys.readouterr().err
        assert expected in error.splitlines()[-1]
        assert "Traceback" not in error
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", run, "--tasks", "letters"]) == 2
    assert "pip install 'sorted-ds[eval]'" in capsys.readouterr().err


def test_a_damaged_score_is_named(tmp_path):
    run = measured_run(tmp_path)
    file = run / "model" / "sorted.json"
    contents = json.loads(file.read_text())
    score = {"task": "a", "metric": "acc", "value": "high", "stderr": None, "num_samples": 4, "num_fewshot": 0}
    contents["subnets"][0]["scores"] = [{**score, "chat": False, "lm_eval": "0.4.12"}]
    file.write_text(json.dumps(contents))
    with pytest.raises(UserError, match="a score is"):
        load(run).table  # noqa: B018
