"""Reads a run file and the DeepSpeed JSON that it names. A mistake in either is one line that says what to change.

In: RUN.toml and `section.key=value` overrides. Out: a frozen `Run`, whose relative paths were made absolute from the
run file's folder; and the engine keys of the JSON as a dictionary.
"""

import difflib
import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sorted_ds.base.errors import UserError
from sorted_ds.base.names import CONFIG_JSON, TRAIN_A_TOKENIZER
from sorted_ds.deploy.model_dir import MODEL_FOLDER
from sorted_ds.run.config import FULL_TEACHES, SCRATCH, Run
from sorted_ds.run.data_config import DataFiles
from sorted_ds.run.section import Section


def load_run(path: Path, overrides: Sequence[str] = ()) -> Run:
    """Returns the checked contents of a run file. Relative paths, also in overrides, start at the run file's folder.

    A run file may extend another one. Raises: UserError for a missing or damaged file, an unknown key, or a value of
    the wrong type.
    """
    fields = _read_extended(path)
    for text in overrides:
        _override(fields, text)
    if EXTENDS in fields:
        raise UserError(f"{EXTENDS} was set by an override. Write it into the run file.")
    try:
        run = Run.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error)}") from None
    return _with_absolute_paths(run, path)


def _read_extended(path: Path, above: Sequence[Path] = ()) -> dict[str, Any]:
    """Returns the contents of a run file, on top of those of the file that its key `extends` names.

    `above`: the files that extend this one. Relative paths of a file that is extended start at its own folder.
    """
    fields = _read_toml(path)
    if EXTENDS not in fields:
        return fields
    base = fields.pop(EXTENDS)
    if not isinstance(base, str):
        raise UserError(f"{path}: {EXTENDS} = {base!r} is not a path. Name one run file.")
    file = (path.parent / Path(base).expanduser()).resolve()
    if file in (path.resolve(), *above):
        raise UserError(f"{path}: {EXTENDS} = {base!r} leads back to the file itself. Name another run file.")
    below = _read_extended(file, (path.resolve(), *above))
    return _merged(_with_paths_from(below, file.parent), fields)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Returns the keys of both. Tables are merged key by key, and every other value of `above` replaces that below."""
    both = below | above
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            both[key] = _merged(below[key], above[key])
    return both


def _with_paths_from(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the contents of a run file with its relative paths made absolute. They are not checked yet."""

    def absolute(value: Any, must_exist: bool) -> Any:
        if isinstance(value, list):
            return [absolute(each, must_exist) for each in value]
        if not isinstance(value, str) or value in WORDS:
            return value
        found = (folder / Path(value).expanduser()).resolve()
        return str(found) if found.exists() or not must_exist else value

    def changed(value: Any, path: tuple[str, ...]) -> Any:
        if path in PATHS or path in NAMES:
            return absolute(value, must_exist=path in NAMES)
        if isinstance(value, dict):
            return {key: changed(own, (*path, key)) for key, own in value.items()}
        if isinstance(value, list):
            return [changed(own, path) if isinstance(own, dict) else own for own in value]
        return value

    return changed(fields, ())


EXTENDS = "extends"
"""The key of a run file that names the run file which it changes."""
FILES = tuple((*where, "text") for where in (("data",), ("data", "sources")))
PATHS = (*FILES, ("run_dir",), ("data", "cache_dir"), ("checkpoint", "branch"), ("engine", "deepspeed"))
"""The keys that are paths."""
WORDS = ("", SCRATCH, FULL_TEACHES, TRAIN_A_TOKENIZER)
"""Values of these keys that are neither paths nor ids."""
NAMES = (
    *((*where, "files") for where in (("data",), ("data", "sources"))),
    ("data", "jsonl"),
    ("data", "tokenizer"),
    ("model", "init"),
    ("loss", "teacher"),
)
"""The keys that are paths where one exists, and otherwise ids of the hub or words."""


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"run file {path} cannot be read: {error.strerror}. Name an existing file.") from None
    except ValueError as error:  # of the TOML or of UTF-8
        raise UserError(f"{path} is not valid TOML: {error}. Correct that line.") from None


def _override(fields: dict[str, Any], text: str) -> None:
    """Sets `section.key=value`. The value is read as TOML, or as a plain string if it is not valid TOML."""
    dotted, equals, value = text.partition("=")
    *sections, key = dotted.strip().split(".")
    if not equals or not key:
        raise UserError(f"override {text!r} should have the form section.key=value, like train.steps=500.")
    for section in sections:
        fields = fields.setdefault(section, {})
        if not isinstance(fields, dict):
            raise UserError(f"override {text!r}: {section!r} is a key and not a section. Write {section}=value.")
    try:
        read = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        read = value
    fields[key] = value if _is_text((*sections, key)) and not isinstance(read, str) else read


def _is_text(path: tuple[str, ...]) -> bool:
    """Returns whether the key takes a string or a path, so that `run_dir=2024` is read as a name."""
    section: type[Section] = Run
    for name in path[:-1]:
        field = section.model_fields.get(name)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, Section):
            return False
        section = field.annotation
    return path[-1] in section.model_fields and section.model_fields[path[-1]].annotation in (str, Path)


def _explain(error: ValidationError) -> str:
    """Describes one mistake on one line. An unknown key comes first, because a misspelt key is also a missing one."""
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    # A key that takes one of several types, as space.layer_order does, has the type in its place: `list[int]`.
    *sections, key = [str(part) for part in first["loc"] if "[" not in str(part)]
    name = ".".join([*sections, key])
    if name in MOVED:
        return f"{name!r} was renamed to {MOVED[name]!r}. Rename it in the run file."
    if first["type"] == "extra_forbidden":
        near = _nearest_key(sections, key)
        return f"unknown key {name!r}. " + (f"Did you mean {near!r}?" if near else "Remove it.")
    if first["type"] == "missing":
        return f"{name!r} is missing. Add it; docs/run-file.md explains it."
    message = first["msg"].removeprefix("Input ").rstrip(".")
    return f"{name} = {first['input']!r} {message if message.startswith('should') else 'should be ' + message}."


def _nearest_key(sections: list[str], key: str) -> str:
    """Returns the known key that is spelt most like the unknown one, or "". Keys of the same section come first."""
    keys = {".".join(path): path[-1] for path in known_keys()}
    own = {name: last for name, last in keys.items() if name.split(".")[:-1] == sections}
    for candidates in (own, keys):
        near = difflib.get_close_matches(key, candidates.values(), n=1)
        if near:
            return next(name for name, last in candidates.items() if last == near[0])
    return ""


def known_keys() -> Iterator[tuple[str, ...]]:
    """Yields every key of a run file with its section: ("seed",), ("batch", "step_rows")."""
    for name, field in Run.model_fields.items():
        yield (name,)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from ((name, key) for key in field.annotation.model_fields)


def _with_absolute_paths(run: Run, path: Path) -> Run:
    folder = path.absolute().parent

    def absolute(value: Path) -> Path:
        return (folder / value.expanduser()).resolve()

    def local_or_id(value: str) -> str:
        folder = absolute(Path(value))
        return str(_model_in(folder)) if value and folder.is_dir() else value

    init = SCRATCH if run.model.init == SCRATCH else local_or_id(run.model.init)
    teacher = run.loss.teacher if run.loss.teacher == FULL_TEACHES else local_or_id(run.loss.teacher)
    run_dir, at, step = run.checkpoint.branch.rpartition("@")
    branch = f"{absolute(Path(run_dir))}@{step}" if at and run_dir else run.checkpoint.branch
    tokenizer = run.data.tokenizer or (TRAIN_A_TOKENIZER if init == SCRATCH else init)

    def found(files: DataFiles) -> dict[str, Any]:
        named = [str(absolute(Path(p))) if absolute(Path(p)).exists() else p for p in files.files]
        return {"text": [absolute(p) for p in files.text], "files": named}

    data = run.data.model_copy(
        update={
            **found(run.data),
            "sources": [source.model_copy(update=found(source)) for source in run.data.sources],
            "cache_dir": absolute(run.data.cache_dir),
            "tokenizer": tokenizer if tokenizer == TRAIN_A_TOKENIZER else local_or_id(tokenizer),
        }
    )
    return run.model_copy(
        update={
            "run_dir": absolute(Path(str(run.run_dir).replace("{name}", path.stem).replace("{seed}", str(run.seed)))),
            "model": run.model.model_copy(update={"init": init}),
            "loss": run.loss.model_copy(update={"teacher": teacher}),
            "data": data,
            "checkpoint": run.checkpoint.model_copy(update={"branch": branch}),
            "engine": run.engine.model_copy(update={"deepspeed": absolute(run.engine.deepspeed)}),
        }
    )


def _model_in(folder: Path) -> Path:
    """Returns the directory of the model: of a run's directory, the one that the run has written."""
    written = folder / MODEL_FOLDER
    is_run = not (folder / CONFIG_JSON).is_file() and (written / CONFIG_JSON).is_file()
    return written if is_run else folder


MOVED = {
    "schedule": "sampling",
    "sampling.draws": "sampling.subnets_per_step",
}
"""Sections and keys of earlier versions -> their present names."""

RUN_FILE_KEYS = {
    "train_batch_size": "[batch]",
    "train_micro_batch_size_per_gpu": "[batch]",
    "gradient_accumulation_steps": "[batch] and [sampling]",
    "managed_gradient_accumulation": "[sampling]",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "[optim]",
    "scheduler": "[optim]",
    "steps_per_print": "log.every_steps",
}
"""Keys of a DeepSpeed JSON that are refused -> the part of the run file that they follow from."""


def load_engine_config(path: Path) -> dict[str, Any]:
    """Returns the engine keys of a DeepSpeed JSON.

    Raises: UserError for a missing or damaged file, or a key that follows from the run file.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"engine.deepspeed: {path} cannot be read: {error.strerror}. Name an existing file.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}. Correct that line.") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} should hold a JSON object. Write {{}} for DeepSpeed's defaults.")
    for key, where in RUN_FILE_KEYS.items():
        if key in config:
            raise UserError(
                f"{path} sets {key!r}, which follows from {where} of the run file. Remove it from the JSON."
            )
    return config
