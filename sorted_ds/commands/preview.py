"""`sorted-ds preview`: prints the first rows that a run trains on, as a person checks a data set.

In: a run file. Out: the rows as text, with what is learned and where documents begin, or as JSON. On disk: the prepared
data, if it was not there yet.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

from rich.console import Console
from rich.text import Text

from sorted_ds.data.loader import Loader
from sorted_ds.data.text.pieces import Piece
from sorted_ds.deploy.table import console
from sorted_ds.run.build import prepare_data
from sorted_ds.run.config import Run
from sorted_ds.run.run_file import load_run
from sorted_ds.tasks import task_of

LEARNED, NOT_LEARNED, BORDER = "green", "dim", "bold magenta"
OPENS, CLOSES, BEGINS = "⟦", "⟧", "▌"
"""What stands around learned text where there are no colours, and before the beginning of a document."""


@dataclass(frozen=True)
class Shown:
    """A row that is shown."""

    row: int
    """Its number among the training rows."""
    num_targets: int
    pieces: list[Piece]


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code. Raises: UserError for what the user can correct."""
    settings = load_run(args.run_file, args.overrides)
    shown = first_rows(settings, args.rows)
    if args.json:
        print(json.dumps({"rows": [asdict(each) for each in shown]}))
        return 0
    show(shown, console(), settings.batch.isolate)
    return 0


def first_rows(settings: Run, number: int) -> list[Shown]:
    """Returns the rows that training begins with. Raises: UserError for data that cannot be used."""
    task = task_of(settings.task)
    data = prepare_data(settings, Console(stderr=True, soft_wrap=True))
    rows = task.rows(data, settings.batch.row_tokens, is_validation=False, isolate=settings.batch.isolate)
    collate = partial(task.collate, row_tokens=settings.batch.row_tokens)
    order = Loader(rows, collate, settings.seed, 1, 1, rank=0, world_size=1)
    shown = []
    for position in range(min(number, len(rows))):
        pieces = task.pieces(data, rows[order.row_at(position)])
        num_targets = sum(len(piece.ids) for piece in pieces if piece.is_target)
        shown.append(Shown(order.row_at(position), num_targets, pieces))
    return shown


def show(rows: Sequence[Shown], out: Console, isolate: bool) -> None:
    """Prints the rows, coloured on a terminal and with signs elsewhere."""
    learned = f"[{LEARNED}]This is learned[/]" if out.is_terminal else f"{OPENS}This is learned{CLOSES}"
    seen = "does not see" if isolate else "sees"
    out.print(f"{learned}, and the rest is not. {BEGINS} begins a document, which {seen} what is before it in its row.")
    for each in rows:
        num_tokens = sum(len(piece.ids) for piece in each.pieces)
        num_begun = sum(piece.begins for piece in each.pieces)
        begun = f"{num_begun} document{'s' * (num_begun != 1)} begin{'s' * (num_begun == 1)}"
        out.print(f"\nrow {each.row}: {each.num_targets} of {num_tokens} tokens are learned, {begun}", style="bold")
        out.print(as_text(each.pieces, out.is_terminal), soft_wrap=True)


def as_text(pieces: Sequence[Piece], is_coloured: bool) -> Text:
    """Returns a row as text. Each document begins on a line of its own."""
    text = Text()
    for number, piece in enumerate(pieces):
        if piece.begins:
            text.append("\n" * (number > 0) + BEGINS, BORDER)
        plain = f"{OPENS}{piece.text}{CLOSES}" if piece.is_target else piece.text
        text.append(piece.text if is_coloured else plain, LEARNED if piece.is_target else NOT_LEARNED)
    return text
