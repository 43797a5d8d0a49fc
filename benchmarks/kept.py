"""Keeps what a long benchmark has measured so far, in a file of JSON lines for one state of the code and its versions.

In: the file, and what its figures depend on. Out: its rows. A stop in the middle of a line costs that line.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path


def kept_rows(file: Path, made_by: Mapping[str, str]) -> list[dict]:
    """Returns the rows. Exits if they were measured with other code or versions; `--anew` removes those."""
    lines = file.read_text().splitlines() if file.is_file() else []
    if not lines:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(made_by) + "\n")
        return []
    kept_by = json.loads(lines[0])
    other = [key for key in kept_by | made_by if kept_by.get(key) != made_by.get(key)]
    if other:
        told = "; ".join(f"{key} = {kept_by.get(key)}, here {made_by.get(key)}" for key in other)
        raise SystemExit(f"{file} was measured with {told}. Take that, or begin with --anew.")
    return [json.loads(line) for line in lines[1:] if line.endswith("}")]


def keep(file: Path, rows: Iterable[dict]) -> None:
    """Appends rows."""
    with file.open("a") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
