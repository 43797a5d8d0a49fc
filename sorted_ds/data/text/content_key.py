"""The content key: the name of the folder of prepared tokens.

In: the files and the settings that decide the tokens. Out: a hash of the files' contents and of the settings. Paths and
times of files do not matter. On disk: CACHE_DIR/file_hashes.json, which holds the hash of each file of known path, size
and time, so that a second start reads no text.
"""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest, sha256
from pathlib import Path

from sorted_ds.base.errors import UserError
from sorted_ds.base.files import replaced
from sorted_ds.data.text.records import BYTE_ORDER_MARK
from sorted_ds.data.text.sources import Source

FORMAT = 1
"""Format of the prepared files. Raise it when the same text and settings would give other bytes."""
HASHES_FILE = "file_hashes.json"
SETTLED_SECONDS = 2.0
"""A file that changed more recently is hashed again, because its next change may get the same time."""


def content_key(sources: Sequence[Source], settings: Mapping[str, object], cache_dir: Path, workers: int) -> str:
    """Returns a hash of the files in this order and of the settings. Raises: UserError when a file is unreadable."""
    digests = _hash_files([source.path for source in sources], cache_dir, workers)
    files = [[source.kind, digest] for source, digest in zip(sources, digests, strict=True)]
    contents = json.dumps({"format": FORMAT, "files": files, **settings}, sort_keys=True)
    return sha256(contents.encode()).hexdigest()[:32]


def _hash_files(paths: Sequence[Path], cache_dir: Path, workers: int) -> list[str]:
    cached = _read_hash_cache(cache_dir)
    stamps = [(str(path.resolve()), *_size_and_time(path)) for path in paths]
    missing = [name for name, size, time_ns in stamps if cached.get(name, [])[:2] != [size, time_ns]]
    with ThreadPoolExecutor(workers) as pool:
        digests = dict(zip(missing, pool.map(hash_file, map(Path, missing)), strict=True))
    latest = time.time_ns() - int(SETTLED_SECONDS * 1e9)
    settled = {
        name: [size, time_ns, digests[name]] for name, size, time_ns in stamps if name in digests and time_ns < latest
    }
    if settled:
        _write_hash_cache(cache_dir, {**_read_hash_cache(cache_dir), **settled})
    return [digests[name] if name in digests else cached[name][2] for name, _, _ in stamps]


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def hash_file(path: Path) -> str:
    """Returns a hash of the file's content. A byte order mark is not part of the text, but it changes the hash."""
    try:
        with path.open("rb") as file:
            mark = file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK
            file.seek(len(BYTE_ORDER_MARK) if mark else 0)
            return file_digest(file, "sha256").hexdigest() + ("-marked" if mark else "")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Make it readable, or leave it out.") from error


def _read_hash_cache(cache_dir: Path) -> dict[str, list]:
    """Returns for each path the size in bytes, the time in nanoseconds and the hash."""
    try:
        known = json.loads((cache_dir / HASHES_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_hash_cache(cache_dir: Path, known: dict[str, list]) -> None:
    """Writes the hashes of known files. A read-only or full disk is no error, because the cache only saves time."""
    with contextlib.suppress(OSError), replaced(cache_dir / HASHES_FILE) as hidden:
        hidden.write_text(json.dumps(known, indent=0))
