"""Records: the lines of JSONL files, plain or packed, and the rows of parquet and Arrow files.

In: a file. Out: its records in order, one at a time, each with the place that errors name. The memory is that of a few
records. pyarrow, of the extra `data`, reads all but JSONL and gzip.
"""

import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from sorted_ds.base.errors import UserError, naming
from sorted_ds.base.extras import needed

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Some editors write this before UTF-8 text."""
KINDS = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".json.gz": "jsonl.gz",
    ".jsonl.zst": "jsonl.zst",
    ".json.zst": "jsonl.zst",
    ".parquet": "parquet",
}
"""How a file of records is read, by the end of its name. Any other file that is named itself is read as JSONL."""
ROWS_AT_A_TIME = 64
"""So many rows of a parquet or Arrow file are in memory."""
COPY_AGAIN = "Copy the file again, or leave it out."

Fields = dict[str, Any]
CountKeys = Callable[[Iterable[str], int], None]
"""Is called with keys that are not read, and the number of records that have them."""


class BadRecordError(UserError):
    """A record that cannot be used. `data.skip_bad` leaves it out."""

    def __init__(self, where: str, what: str, reason: str, advice: str = "Correct or remove the {record}."):
        """`what` is wrong counts together with others; `reason` is `what` with the record's own values."""
        record = "line" if is_line(where) else "row" if ", row " in where else "file"
        super().__init__(f"{where} {reason}. {advice.format(record=record)}")
        self.what = what


def is_line(where: str) -> bool:
    """Returns whether a place is a line of a file, like `a.jsonl:3`."""
    return where.rpartition(":")[2].isdigit()


def kind_of(path: Path) -> str:
    """Returns how a file of records is read."""
    return next((kind for end, kind in KINDS.items() if path.name.endswith(end)), "jsonl")


def records(path: Path, kind: str, wanted: Iterable[str], count: CountKeys) -> Iterator[tuple[str, bytes | Fields]]:
    """Yields the records of a file, each with its place: a line as it is, or the `wanted` fields of a row.

    `count` gets the other columns of a table. Raises: UserError for a damaged file, or a table without the columns.
    """
    if kind in ("parquet", "arrow"):
        yield from _rows(path, kind, list(wanted), count)
        return
    with naming(path, COPY_AGAIN), _opened(path, kind) as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if line.strip():
                yield f"{path}:{number}", line


def fields_of(where: str, record: bytes | Fields) -> Fields:
    """Returns the fields of a record. Raises: BadRecordError for a line that is not a JSON object."""
    if isinstance(record, dict):
        return record
    try:
        found = json.loads(decode(record, where))
    except (ValueError, RecursionError) as error:
        raise BadRecordError(where, "not valid JSON", f"is not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise BadRecordError(where, "not a JSON object", "is not a JSON object")
    return found


def decode(data: bytes, where: str) -> str:
    """Returns text. Raises: BadRecordError if it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x})"
        raise BadRecordError(where, "not UTF-8", reason, "Convert it, or leave it out.") from error


def _opened(path: Path, kind: str) -> IO[bytes] | gzip.GzipFile:
    if kind == "jsonl.gz":
        return gzip.open(path)
    if kind == "jsonl.zst":
        packed = needed("pyarrow", "data", f"{path}, which is packed by zstd,").input_stream(
            str(path), compression="zstd"
        )
        return io.BufferedReader(packed, 2**20)
    return path.open("rb")


def _rows(path: Path, kind: str, wanted: list[str], count: CountKeys) -> Iterator[tuple[str, Fields]]:
    number = 0
    with naming(path, COPY_AGAIN):
        names, batches = _table(path, kind, wanted)
        if wanted[0] not in names:
            raise UserError(
                f"{path} has no column {wanted[0]!r}, but {', '.join(names)}. Set data.fields to one of them."
            )
        for batch in batches:
            count([name for name in names if name not in wanted], batch.num_rows)
            for start in range(0, batch.num_rows, ROWS_AT_A_TIME):
                for fields in batch.slice(start, ROWS_AT_A_TIME).to_pylist():
                    number += 1
                    yield f"{path}, row {number}", fields


def _table(path: Path, kind: str, wanted: list[str]) -> tuple[list[str], Iterator[Any]]:
    """Returns the names of all columns, and batches of rows with the wanted columns that there are."""
    if kind == "parquet":
        file = needed("pyarrow.parquet", "data", f"{path}, a parquet file,").ParquetFile(path)
        names = list(file.schema_arrow.names)
        return names, file.iter_batches(ROWS_AT_A_TIME, columns=[name for name in wanted if name in names])
    pyarrow = needed("pyarrow", "data", f"{path}, an Arrow file,")
    reader = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
    names = list(reader.schema.names)
    return names, (batch.select([name for name in wanted if name in names]) for batch in reader)
