"""Writes docs/run-file.md, the reference of the run file: `python tools/reference.py`.

In: the sections and docstrings of sorted_ds/run/config.py, and the DeepSpeed keys of sorted_ds/engine/modes.py. On
disk: the whole page. A test fails when the page is not up to date.
"""

from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from sorted_ds.engine.modes import ANY, SECTION_KEYS, TOP_KEYS, AtLeast
from sorted_ds.run.config import Run
from sorted_ds.run.section import Section

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "run-file.md"
INTRODUCTION = """\
<!-- Made by tools/reference.py from sorted_ds/run/config.py and sorted_ds/engine/modes.py. Do not edit it here. -->

# Run file

A run is described by one TOML file. This page lists every key with its value, its default and its meaning. The page is
generated from the docstrings of the configuration by `python tools/reference.py`.

- A relative path in a run file starts at the folder of the run file.
- A key can be replaced on the command line: `sorted-ds train my.toml train.steps=500`.
- An unknown key is an error that names the nearest known key.
- A key without a default that is not marked as required may be left out.
- `sorted-ds plan my.toml` checks the whole file and trains nothing.

The repository has complete run files in `launch/runs/`: `demo.toml` for the demo, `text.toml` as a start for your own
text, `chat.toml` for your own conversations, and `1b.toml`, `8b.toml` and `70b.toml` for clusters.
"""
TOP_LEVEL = """\
## Top level

These keys stand at the beginning of the file, before the first section.
"""
DEEPSPEED = """\
## DeepSpeed JSON

`engine.deepspeed` names a JSON file with DeepSpeed's own keys. The folder `ds_configs/` has one file for each usual
choice. Batch sizes, gradient clipping, the optimizer and the learning rate follow from the run file, so their keys are
refused in the JSON. A key or a value that is not in this table is refused at the start, because it was not compared
with the reference ([what is refused](exactness.md#what-is-refused)).

Three rules concern more than one key:

- `offload_optimizer` needs stage 1, 2 or 3. `offload_param` needs stage 3 together with `offload_optimizer`.
- `overlap_comm` needs stage 2 or 3.
- Stage 0 in bf16 accumulates gradients in bf16, so `data_types.grad_accum_dtype` is refused there.
"""


def page() -> str:
    """Returns the whole page as Markdown."""
    keys = {name: field for name, field in Run.model_fields.items() if not _is_section(field)}
    sections = {name: field.annotation for name, field in Run.model_fields.items() if _is_section(field)}
    parts = [INTRODUCTION, TOP_LEVEL, _fields_table(keys)]
    for name, section in sections.items():
        parts += [f"## `[{name}]`\n\n{_one_line(section.__doc__)}\n", _fields_table(section.model_fields)]
    return "\n".join([*parts, DEEPSPEED, _deepspeed_table()])


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def _fields_table(fields: dict[str, FieldInfo]) -> str:
    return _table(
        ("key", "value", "default", "meaning"),
        [(f"`{name}`", _kind(f.annotation), _default(f), _one_line(f.description)) for name, f in fields.items()],
    )


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _kind(annotation: Any) -> str:
    """Returns how a value of this type is written in TOML."""
    names = {str: "string", int: "integer", float: "number", bool: "true or false", Path: "path"}
    if annotation in names:
        return names[annotation]
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "table"
    parts = get_args(annotation)
    if all(isinstance(part, str) for part in parts):
        return "string"
    if getattr(annotation, "__origin__", None) is list:
        return f"list of {_kind(parts[0])}s"
    if getattr(annotation, "__origin__", None) is tuple:
        return f"{len(parts)} numbers"
    if getattr(annotation, "__origin__", None) is dict:
        return "table"
    return _kind(parts[0])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value in ("", [], {}, None):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list | tuple):
        return f"`[{', '.join(_toml(item) for item in value)}]`"
    return f"`{_toml(value)}`"


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str | Path) else f"{value:_}" if isinstance(value, int) else f"{value}"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _deepspeed_table() -> str:
    """Returns the table of the keys that a DeepSpeed JSON may have, with their values."""
    keys = {f"{section}.{key}": values for section, own in SECTION_KEYS.items() for key, values in own.items()}
    keys |= {key: values for key, values in TOP_KEYS.items() if key not in SECTION_KEYS}
    rows = [(f"`{key}`", _allowed(values)) for key, values in keys.items() if key not in SECTION_KEYS]
    return _table(("key", "allowed values"), rows)


def _allowed(values: Any) -> str:
    if isinstance(values, AtLeast):
        return str(values)
    if values is ANY:
        return "any"
    return ", ".join(f"`{_json(value)}`" for value in values)


def _json(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
