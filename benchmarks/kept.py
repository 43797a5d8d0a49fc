"""What a long benchmark has measured so far: a file of JSON lines, thrown away when what made it changes.

In: the file, and what its figures depend on. Out: its rows; a stop in the middle of a line costs that line.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path


def kept_rows(file: Path, made_by: Mapping[str, str]) -> list[dict]:
    """Those of the same code and versions. Otherwise the file begins anew, and there are none."""
    lines = file.read_text().splitlines() if file.is_file() else []
    if not lines or json.loads(lines[0]) != made_by:
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(made_by) + "\n")
        return []
    return [json.loads(line) for line in lines[1:] if line.endswith("}")]


def keep(file: Path, rows: Iterable[dict]) -> None:
    with file.open("a") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
