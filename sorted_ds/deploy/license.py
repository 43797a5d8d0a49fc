"""The license of the checkpoint that training began with, which goes on with the trained model and each export.

In: the checkpoint's directory. Out: `Sorted.base`, which states the license as the header of a model card does, and
copies of the files that hold it.
"""

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import yaml

from sorted_ds.base.errors import UserError
from sorted_ds.base.names import CARD
from sorted_ds.deploy.model_dir import CHECKPOINT, SCRATCH, SORTED_JSON, TRAINED_FROM, Base, ModelDir
from sorted_ds.nested.hf_weights import LICENSE_WORDS

LICENSE_NAME = re.compile("|".join(LICENSE_WORDS), re.IGNORECASE)
"""What is in the name of a file that holds a license or belongs to it."""
ENDING = re.compile(r"\.[a-z]\w*$", re.IGNORECASE)
TEXT_ENDINGS = ("", ".txt", ".md", ".rst", ".pdf", ".html")
"""The endings of files that hold a license. Others are those of code and of data, like licenses.json. An ending in
capital letters, as in LICENSE.MIT and COPYING.LESSER, is the name of a license."""
LICENSE_FOLDERS = ("license", "licenses", "licence", "licences")
"""The names of folders, in any case, that hold nothing but licenses."""
HEADER = re.compile(r"\A\s*---[ \t]*\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
"""The header of a model card: the text between its first two lines `---`."""
LINK = "license_link"
TAGS = ("license", "license_name", LINK)
"""The keys of a model card's header that state a license, as the Hugging Face hub defines them."""
BASE_MODEL = "base_model"


def base_of(source: Path | None, hub_id: str | None) -> Base | None:
    """Returns what a network is trained from: `Sorted.base`. None means that this is not known.

    `source`: the checkpoint's directory; None for random weights. `hub_id`: its name on the hub; None for a directory.
    The model of another run hands its own base on.
    """
    if source is None:
        return {TRAINED_FROM: SCRATCH}
    tags = license_tags(source)
    stated = {**({BASE_MODEL: hub_id} if hub_id else {}), **tags}
    if not (source / SORTED_JSON).is_file():
        return {TRAINED_FROM: CHECKPOINT, **stated}
    before = _base_of_other_run(source)
    if not stated:
        return before
    kept = {key: value for key, value in (before or {}).items() if not (tags and key in TAGS)}
    return {**kept, TRAINED_FROM: CHECKPOINT, **stated}


def _base_of_other_run(source: Path) -> Base | None:
    """Returns the base of another run's model, which is not known either if its sorted.json is damaged."""
    with suppress(UserError):
        return ModelDir(source, source).read().base
    return None


def license_tags(source: Path) -> dict[str, str | list[str]]:
    """Returns the license that a directory's model card states, by the keys `TAGS`. Without a card there are none.

    A card is written by hand and may hold anything, so what cannot be read is left out and nothing is raised.
    """
    try:
        card = (source / CARD).read_text(encoding="utf-8-sig", errors="replace")
    except OSError:
        return {}
    header = HEADER.match(card)
    fields = _fields(header[1]) if header else {}
    return {key: value for key in TAGS if (value := _value(fields.get(key)))}


def _fields(header: str) -> Mapping[str, object]:
    """Returns the fields of a header. If YAML refuses it, they are those of the lines that state a license."""
    fields = _mapping(header)
    if fields is not None:
        return fields
    lines = re.findall(rf"^({'|'.join(TAGS)}):(.*)$", header, re.MULTILINE)
    return {key: (_mapping(f"{key}:{text}") or {key: text})[key] for key, text in lines}


def _mapping(text: str) -> Mapping[str, object] | None:
    """Returns the mapping that a YAML text is; None if it is no mapping, or YAML refuses it."""
    try:
        found = yaml.safe_load(text)
    except Exception:  # YAMLError, but also ValueError for a date like 2024-13-01, and RecursionError
        return None
    return found if isinstance(found, dict) else None


def _value(value: object) -> str | list[str]:
    """Returns the value of a tag as text or as a list of texts, which is empty for anything else."""
    if isinstance(value, list):
        return [text for each in value if (text := _text(each))]
    return _text(value)


def _text(value: object) -> str:
    """Returns a scalar as one line of text, and an empty text for anything else."""
    return " ".join(str(value).split()) if value and isinstance(value, str | int | float) else ""


def license_files(folder: Path, base: Base | None) -> list[Path]:
    """Returns the paths, relative to the directory, of the files that hold a license.

    These are the files with such a name, everything in a folder LICENSES, and the file that `license_link` names.
    """
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name.lower() in LICENSE_FOLDERS:
            found += sorted(file for file in path.rglob("*") if file.is_file())
        elif path.is_file() and LICENSE_NAME.search(path.name) and _is_text(path.name):
            found.append(path)
    linked = _linked_file(folder, base or {})
    return list(dict.fromkeys([*(path.relative_to(folder) for path in found), *linked]))


def _linked_file(folder: Path, base: Base) -> list[Path]:
    """Returns the relative path of the text file in the directory that `license_link` names, if there is one."""
    link = Path(os.path.normpath(str(base.get(LINK, ""))))
    is_inside = not link.is_absolute() and ".." not in link.parts
    with suppress(OSError):  # a name that is too long
        if is_inside and _is_text(link.name) and link != Path(CARD) and (folder / link).is_file():
            return [link]
    return []


def _is_text(name: str) -> bool:
    found = ENDING.search(name)
    ending = found[0] if found else ""
    return ending.lower() in TEXT_ENDINGS or ending.isupper()


def copy_license_files(source: Path, folder: Path, base: Base | None) -> None:
    """Copies the files that hold a license. No file that is in `folder` already is replaced. Raises: OSError."""
    for path in license_files(source, base):
        if not (folder / path).exists():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, folder / path)


def card_tags(base: Base | None) -> dict[str, str | list[str]]:
    """Returns what the header of an exported model's card states of its base: only keys that the hub defines."""
    return {key: value for key, value in (base or {}).items() if key in (BASE_MODEL, *TAGS)}


def license_text(base: Base | None, folder: Path) -> str:
    """Returns what the card of the model in `folder` says of the license."""
    files = _links(license_files(folder, base))
    if base is None:
        found = f" These files came with it: {files}." if files else ""
        return (
            f"It is not known what the network was trained from, and under which license.{found} Find out before you "
            "publish this model."
        )
    if base[TRAINED_FROM] == SCRATCH:
        if files:
            return f"It was trained from scratch. Its license is in {files}."
        return "It was trained from scratch and carries no license. Add one before you publish it."
    if stated := base.get("license"):
        return f"It is under {_licenses(stated)}{f' ({files})' if files else ''}."
    if files:
        return f"The license of its base model is in {files}. The base model's card does not name it."
    return "Its base model came without a license. Look up its terms before you publish this model."


def _licenses(stated: str | list[str]) -> str:
    if isinstance(stated, str):
        return f"the license of its base model: `{stated}`"
    return f"the licenses of its base model: {', '.join(f'`{each}`' for each in stated)}"


def _links(files: Iterable[Path]) -> str:
    """Returns links to the files in Markdown. A folder of licenses is one link."""
    in_folder = {path for path in files if len(path.parts) > 1 and path.parts[0].lower() in LICENSE_FOLDERS}
    names = (f"{path.parts[0]}/" if path in in_folder else path.as_posix() for path in files)
    return ", ".join(f"[{name}]({name.replace(' ', '%20')})" for name in dict.fromkeys(names))
