"""A run on a mixture of plain text and conversations: prepared, shown, trained on two ranks, resumed and evaluated."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from sorted_ds.commands.cli import main
from sorted_ds.run.build import order_of
from sorted_ds.run.run_file import load_run
from sorted_ds.tasks import task_of
from tests.chats import PLAIN, chat_tokenizer, lines, turns
from tests.launched import copied, masters, one_error, run_dir, train
from tests.runs import run_file

SOURCES = """\
[[data.sources]]
name = "prose"
weight = 0.75
text = ["text"]
[[data.sources]]
name = "chat"
weight = 0.25
files = ["chat.jsonl"]
form = "messages"
[[data.phases]]
from_step = 4
weights = { prose = 0.25, chat = 0.75 }
"""


@pytest.fixture(scope="module")
def run(chat_base, tmp_path_factory) -> Path:
    """The run file of a run of 8 steps on two ranks that was not interrupted."""
    folder = tmp_path_factory.mktemp("mixture")
    path = run_file(folder)
    chat_tokenizer(chat_base, folder / "tokenizer", PLAIN)
    records = [{"messages": turns(f"{k}+{k}?" * (k % 5 + 1), f"{2 * k} " * (k % 7 + 1))} for k in range(80)]
    lines(folder / "chat.jsonl", records)
    text = path.read_text().replace('text = ["text"]\n', 'tokenizer = "tokenizer"\n')
    path.write_text(text + SOURCES)
    train(path)
    return path


def test_every_step_trains_the_rows_of_its_mixture(run):
    settings = load_run(run)
    task = task_of(settings.task)
    rows = task.rows(task.find_prepared(settings), 32, is_validation=False)
    order = order_of(settings, rows)
    for step, expected in ((0, 2), (3, 2), (4, 6), (7, 6)):
        numbers = [order.row_at(position) for position in range(step * 8, step * 8 + 8)]
        assert [rows.name_of(number) for number in numbers].count("chat") == expected
    learned = {name: [rows.sources[name][k].is_target[1:].mean() for k in range(5)] for name in rows.sources}
    assert set(learned["prose"]) == {1.0}
    assert max(learned["chat"]) < 1


def test_what_is_read_is_told_by_source(run, capsys):
    assert main(["prepare", str(run), "train.steps=8"]) == 0
    said = capsys.readouterr().err
    assert "prose: 30 files: " in said
    assert "chat: 1 files: " in said
    assert "prose: 32 of the run's 64 rows (50.0%), which is " in said
    assert main(["preview", str(run), "--rows", "8", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["rows"]
    assert [row["source"] for row in shown].count("chat") == 2


def test_a_killed_run_goes_on_bit_equal_and_its_model_is_evaluated(run, tmp_path, capsys):
    again = copied(run, tmp_path / "again", keep_steps=4)
    train(again)
    before, after = masters(run), masters(again)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert main(["eval", str(run_dir(again)), "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    trained = json.loads((run_dir(run) / "subnets.json").read_text())
    for found, expected in zip(table["measured"], trained["subnets"], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert list(table["baseline"]) == ["unigram model of each source"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('tokenizer = "tok', 'text = ["text"]\ntokenizer = "tok', "together with data.text. Move text into a table"),
        ('name = "chat"', 'name = "prose"', "data.sources has two sources with the name 'prose'. Rename one."),
        ("prose = 0.25, chat", "poetry = 0.25, chat", "has a weight for 'poetry', but data.sources has prose, chat."),
        ("prose = 0.25, chat = 0.75", "prose = 0, chat = 0", "leaves no source from step 4 on. Give one a weight"),
        ("[[data.phases]]", "[[data.phases]]\nfrom_step = 4\nweights = {}\n[[data.phases]]", "has two phases with one"),
        ("weight = 0.75", "weight = 0.7512345", "repeat after"),
        ('files = ["chat.jsonl"]', "", "data.sources, chat: data names no text. Set data.text or data.files."),
        ('tokenizer = "tokenizer"', 'tokenizer = "train"', "data.sources need a tokenizer that exists"),
        ("from_step = 4", "from_step = 400", "data.phases has from_step = 400, but the last step is 399."),
    ],
)
def test_a_mistake_is_one_line(run, tmp_path, capsys, old, new, message):
    for name in ("text", "tokenizer"):
        shutil.copytree(run.parent / name, tmp_path / name)
    for name in ("chat.jsonl", "zero.json"):
        shutil.copy(run.parent / name, tmp_path)
    assert old in run.read_text()
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(run.read_text().replace(old, new, 1))
    assert main(["plan", str(wrong)]) == 2
    error = one_error(capsys.readouterr().err)
    assert message in error


def test_another_mixture_is_another_run(run, tmp_path):
    again = copied(run, tmp_path / "again", keep_steps=4)
    again.write_text(again.read_text().replace("chat = 0.75", "chat = 0.5"))
    said = one_error(train(again, code=2))
    assert "data.weights" in said
