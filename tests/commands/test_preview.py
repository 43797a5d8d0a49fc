"""`sorted-ds preview` shows the rows of the first step, what is learned in them, and where documents begin."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from sorted_ds.commands.cli import main
from sorted_ds.commands.preview import as_text, first_rows, show
from sorted_ds.data.loader import Loader
from sorted_ds.data.rows import Row
from sorted_ds.data.text.pieces import pieces_of
from sorted_ds.data.text.tokenizer import load_tokenizer
from sorted_ds.run.run_file import load_run
from sorted_ds.tasks import task_of
from tests.chats import (
    MARKED,
    chat_tokenizer,
    lines,
    turns,
)
from tests.data.test_prepare import word_tokenizer
from tests.runs import run_file


@pytest.fixture(scope="module")
def run(chat_base, tmp_path_factory) -> Path:
    """A run on conversations."""
    folder = tmp_path_factory.mktemp("preview")
    path = run_file(folder)
    lines(folder / "chat.jsonl", [{"messages": turns(f"{k}+{k}?", f"{2 * k}", "why?", "so")} for k in range(60)])
    chat_tokenizer(chat_base, folder / "chat", MARKED)
    path.write_text(
        path.read_text().replace('text = ["text"]', 'files = ["chat.jsonl"]\nform = "messages"\ntokenizer = "chat"')
    )
    return path


def test_json_has_the_rows_that_the_first_step_trains_on(run, capsys):
    assert main(["preview", str(run), "--rows", "5", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["rows"]
    settings = load_run(run)
    task = task_of(settings.task)
    rows = task.rows(task.find_prepared(settings), 32, is_validation=False)
    (batches,) = Loader(rows, lambda rows, size: rows, settings.seed, 5, 5, 0, 1).batches(0, 1)
    for each, row in zip(shown, batches[0], strict=True):
        assert [i for piece in each["pieces"] for i in piece["ids"]] == row.ids.tolist()
        learned = [i for piece in each["pieces"] if piece["is_target"] for i in piece["ids"]]
        assert learned == row.ids[1:][row.is_target[1:]].tolist()
        assert each["num_targets"] == len(learned) > 0
        assert sum(piece["begins"] for piece in each["pieces"]) == row.begins.sum() > 0


def test_a_file_gets_signs_and_a_terminal_gets_colours(run):
    shown = first_rows(load_run(run), 1)
    plain, coloured = io.StringIO(), io.StringIO()
    show(shown, Console(file=plain, width=120), isolate=False)
    show(shown, Console(file=coloured, force_terminal=True, color_system="standard", width=120), isolate=True)
    assert "\x1b" not in plain.getvalue()
    assert "▌<|user|>" in plain.getvalue()
    learned = next(piece.text for piece in shown[0].pieces if piece.is_target)
    assert f"⟦{learned}⟧" in plain.getvalue()
    first_line = learned.split("\n")[0]
    assert f"\x1b[32m{first_line}" in coloured.getvalue()
    assert "⟦" not in coloured.getvalue()
    assert "which sees" in plain.getvalue()
    assert "which does not see" in coloured.getvalue()


def test_pieces_end_where_documents_begin_and_where_learning_changes(tmp_path):
    tokenizer = load_tokenizer(word_tokenizer(tmp_path, 20))
    is_target = np.array([True, True, False, True, True, True])
    begins = np.array([False, False, False, False, True, False])
    pieces = pieces_of(Row(np.arange(2, 8), is_target, begins), tokenizer)
    assert [(piece.ids, piece.is_target, piece.begins) for piece in pieces] == [
        ([2], False, False),
        ([3], True, False),
        ([4], False, False),
        ([5], True, False),
        ([6, 7], True, True),
    ]
    assert as_text(pieces, is_coloured=False).plain == "w2⟦w3⟧w4⟦w5⟧\n▌⟦w6 w7⟧"


def test_control_characters_of_a_text_do_not_reach_the_terminal(chat_base):
    tokenizer = load_tokenizer(str(chat_base))
    ids = tokenizer("a\x1b[31mb\n", add_special_tokens=False).input_ids
    every = np.ones(len(ids), bool)
    assert "".join(piece.text for piece in pieces_of(Row(np.array(ids), every, ~every), tokenizer)) == "a␛[31mb\n"


def test_a_mistake_in_the_run_file_is_one_line(run, capsys):
    assert main(["preview", str(run), "batch.row_tokens=100000"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: batch.row_tokens = 100000 is too long")
