"""Writes README's reference of run-file keys from sorted_ds/config.py: `python tools/reference.py`."""

from pathlib import Path
from typing import get_args

from pydantic.fields import FieldInfo

from sorted_ds.config import Run, Section

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- reference: begin, made by tools/reference.py -->\n", "<!-- reference: end -->\n"


def reference() -> str:
    """Markdown: a table of each section's keys."""
    parts = [_table("", "", {name: f for name, f in Run.model_fields.items() if not _is_section(f)})]
    for name, field in Run.model_fields.items():
        if _is_section(field):
            section = field.annotation
            parts.append(_table(f"[{name}]", _one_line(section.__doc__), section.model_fields))
    return "\n".join(parts)


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def _table(title: str, meaning: str, fields: dict[str, FieldInfo]) -> str:
    heading = f"**`{title}`** {meaning}\n\n" if title else ""
    rows = [
        f"| `{name}` | {_kind(field)} | {_default(field)} | {_one_line(field.description)} |"
        for name, field in fields.items()
    ]
    return heading + "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows]) + "\n"


def _kind(field: FieldInfo) -> str:
    """As it is written in TOML."""
    return _kind_of(field.annotation)


def _kind_of(annotation) -> str:
    names = {str: "string", int: "integer", float: "number", bool: "true or false", Path: "path"}
    if annotation in names:
        return names[annotation]
    parts = get_args(annotation)
    if all(isinstance(part, str) for part in parts):
        return "string"
    if getattr(annotation, "__origin__", None) is list:
        return f"list of {_kind_of(parts[0])}s"
    if getattr(annotation, "__origin__", None) is tuple:
        return f"{len(parts)} numbers"
    if getattr(annotation, "__origin__", None) is dict:
        return "table"
    return _kind_of(parts[0])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value in ("", [], {}):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list | tuple):
        return f"`[{', '.join(_toml(item) for item in value)}]`"
    return f"`{_toml(value)}`"


def _toml(value) -> str:
    return f'"{value}"' if isinstance(value, str | Path) else f"{value:_}" if isinstance(value, int) else f"{value}"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def main() -> None:
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{reference()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
