"""Writes README's reference of run-file keys and its list of files: `python tools/reference.py`.

The keys come from sorted_ds/run/config.py, a file's line from its docstring.
"""

import ast
import itertools
import subprocess
from pathlib import Path
from typing import get_args

from pydantic.fields import FieldInfo

from sorted_ds.run.config import Run, Section

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- {}: begin, made by tools/reference.py -->\n", "<!-- {}: end -->\n"
NOT_LISTED = ("README.md", "LICENSE", ".gitignore")
OTHER_FILES = {
    ".ci/run": "what must pass before a change lands",
    "CONTRIBUTING.md": "how to add a family, a strategy, a mode, a key",
    "Makefile": "set-up, demo, tests, checks",
    "docs/benchmarks.md": "times on a GPU, against plain DeepSpeed and the Hugging Face Trainer",
    "docs/log.md": "what was measured, and what did not work",
    "docs/matrix.md": "every mode of the engine against plain PyTorch",
    "docs/matrix.jsonl": "what `python -m benchmarks.matrix` has measured so far",
    "docs/matrix_cuda.md": "the same on CUDA with NCCL, as far as it has run",
    "docs/scaling.md": "what a run costs on many GPUs: formulas, their errors, and what they say",
    "docs/pareto.png": "the demo's figure",
    "ds_configs": "DeepSpeed JSON: ZeRO stage, and bf16 where the name says so, else fp32",
    "pyproject.toml": "packaging, and why each dependency is there",
}


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


def files() -> str:
    """Markdown: a line for every file that is kept."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = sorted(name for name in listed.stdout.split() if name not in NOT_LISTED and (ROOT / name).exists())
    rows = dict.fromkeys(f"| `{name}` | {_job(name)} |" for name in map(_folded, names))
    return "\n".join(["| file | job |", "|---|---|", *rows]) + "\n"


def _folded(name: str) -> str:
    """The DeepSpeed configs are one line: each is three lines itself."""
    return "ds_configs" if name.startswith("ds_configs/") else name


def _job(name: str) -> str:
    """The first sentence of a file's docstring, or of its first comment."""
    if name in OTHER_FILES:
        return OTHER_FILES[name]
    source = (ROOT / name).read_text(encoding="utf-8")
    text = ast.get_docstring(ast.parse(source)) if name.endswith(".py") else _first_comment(source)
    text = text or "marks a package"
    sentence = _one_line(text.split("\n\n")[0]).split(". ")[0].rstrip(".:").replace("|", "\\|")
    first = sentence.split()[0].rstrip("'s,")
    keeps_capital = first == "Hugging" or first[1:] != first[1:].lower()
    return sentence if keeps_capital else sentence[0].lower() + sentence[1:]


def _first_comment(source: str) -> str:
    lines = [line for line in source.splitlines() if not line.startswith("#!")]
    own = itertools.takewhile(lambda line: line.startswith("# "), lines)
    return " ".join(line.removeprefix("# ") for line in own)


def main() -> None:
    text = README.read_text(encoding="utf-8")
    for name, made in (("reference", reference()), ("files", files())):
        before, _, rest = text.partition(BEGIN.format(name))
        _, _, after = rest.partition(END.format(name))
        text = f"{before}{BEGIN.format(name)}\n{made}\n{END.format(name)}{after}"
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
