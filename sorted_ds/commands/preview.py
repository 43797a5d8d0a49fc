"""`sorted-ds preview`: prints the first rows that a run trains on, as a person checks a data set.

In: a run file. Out: the rows as text, with what is learned and where documents begin, or as JSON. On disk: the prepared
data, if it was not there yet.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.text import Text

from sorted_ds.data.mixture import JoinedRows
from sorted_ds.data.text.pieces import Piece
from sorted_ds.deploy.table import console
from sorted_ds.run.build import order_of, prepare_data
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
    source: str = ""
    """The source of a mixture that it is from."""


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
    order = order_of(settings, rows)
    shown = []
    for position in range(min(number, len(rows))):
        row = order.row_at(position)
        pieces = task.pieces(data, rows[row])
        num_targets = sum(len(piece.ids) for piece in pieces if piece.is_target)
        source = rows.name_of(row) if isinstance(rows, JoinedRows) else ""
        shown.append(Shown(row, num_targets, pieces, source))
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
        source = f" of {each.source}" if each.source else ""
        out.print(
            f"\nrow {each.row}{source}: {each.num_targets} of {num_tokens} tokens are learned, {begun}", style="bold"
        )
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
