"""The file in which a long benchmark keeps its results, so that it can be stopped and continued.

In: new rows, and what the results depend on. Out: the rows of earlier starts. On disk: JSON lines; the first one says
with which code and versions the rows were measured. A stop in the middle of a line loses that line alone.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path


def read_rows(file: Path, made_by: Mapping[str, str]) -> list[dict]:
    """Returns the rows of earlier starts. Creates the file if there is none.

    Raises: SystemExit when the rows were measured with other code or versions.
    """
    lines = file.read_text().splitlines() if file.is_file() else []
    if not lines:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(made_by) + "\n")
        return []
    measured_by = json.loads(lines[0])
    other = [key for key in measured_by | made_by if measured_by.get(key) != made_by.get(key)]
    if other:
        differences = "; ".join(f"{key} = {measured_by.get(key)}, here {made_by.get(key)}" for key in other)
        raise SystemExit(
            f"{file} was measured with {differences}. Use that, or start with --anew, which deletes the file."
        )
    return [json.loads(line) for line in lines[1:] if line.endswith("}")]


def append_rows(file: Path, rows: Iterable[dict]) -> None:
    """Adds rows to the file."""
    with file.open("a") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
