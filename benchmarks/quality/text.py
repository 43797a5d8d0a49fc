"""The text of the test bed: the Python sources of a pinned list of packages, each file once.

In: packages.txt. On disk: FOLDER/text.jsonl, a line for each file, and its SHA-256 in FOLDER/text.sha256. Packages are
downloaded, not installed, and nothing of them is run. Tests, generated files, and copies of other packages are left
out, because they repeat what stands elsewhere.
"""

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

PACKAGES = Path(__file__).with_name("packages.txt")
LEFT_OUT = re.compile(
    r"(^|/)(tests?|testing|_?vendor(ed)?|locales?|migrations)/|(^|/)(test_|conftest)|_pb2\.py$", re.IGNORECASE
)
SMALLEST_BYTES, LARGEST_BYTES = 500, 200_000


def text_file(folder: Path) -> Path:
    """Returns the file with the text, and makes it if it is missing. Raises: SystemExit if a download fails."""
    file, checksum = folder / "text.jsonl", folder / "text.sha256"
    if not checksum.is_file():
        wheels = folder / "wheels"
        wheels.mkdir(parents=True, exist_ok=True)
        pins = PACKAGES.read_text().split()
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*command, "--only-binary", ":all:", "--dest", str(wheels), *pins], check=False)
        if done.returncode:
            raise SystemExit("a package could not be downloaded")
        digest = hashlib.sha256()
        with file.open("w", encoding="utf-8") as lines:
            for name, contents in sources(sorted(wheels.glob("*.whl"), key=lambda path: path.name.lower())):
                line = json.dumps({"text": contents, "file": name}) + "\n"
                digest.update(line.encode())
                lines.write(line)
        checksum.write_text(digest.hexdigest() + "\n")
    return file


def sources(wheels: list[Path]) -> Iterator[tuple[str, str]]:
    """Yields the name and the text of each source file, in the order of packages and names, each content once."""
    seen = set()
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for info in sorted(archive.infolist(), key=lambda info: info.filename):
                is_source = info.filename.endswith(".py") and not LEFT_OUT.search(info.filename)
                if not is_source or not SMALLEST_BYTES <= info.file_size <= LARGEST_BYTES:
                    continue
                contents = archive.read(info)
                key = hashlib.sha256(contents).digest()
                try:
                    text = contents.decode("utf-8")
                except UnicodeDecodeError:
                    continue
                if key not in seen:
                    seen.add(key)
                    yield f"{wheel.name.split('-')[0]}/{info.filename}", text
