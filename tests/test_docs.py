"""The documents: no broken link, a README that is short and complete, a reference of the run file that is current.

Links are checked in the Markdown itself, without building the site, as GitHub follows them: files relative to the page,
anchors by the headings of the page that they lead to.
"""

import importlib.util
import re
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from sorted_ds.run.run_file import known_keys

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")])
README_LINES = 150
NO_COMMANDS = {"__init__", "cli", "rank"}
"""Modules of `commands/` that are no command of `sorted-ds`."""

LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
TOCTREE = re.compile(r"^```\{toctree\}\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^ *```.*?^ *```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def links(text: str) -> list[str]:
    """Where the links and images of a page lead, without those in code."""
    return LINK.findall(CODE.sub("code", text))


@cache
def anchors(path: Path) -> set[str]:
    """The anchors that GitHub, and the site, give to the headings of a page; a repeated heading gets a number."""
    found: dict[str, int] = {}
    names = set()
    for heading in HEADING.findall(FENCE.sub("", path.read_text(encoding="utf-8"))):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        names.add(f"{slug}-{found[slug]}" if slug in found else slug)
        found[slug] = found.get(slug, 0) + 1
    return names


def broken_links(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere."""
    broken = []
    for link in links(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_no_link_is_broken(page):
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path):
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# Other\n## `[model]`, and more\n## Twice\n## Twice\n```\n# no heading\n```\n")
    page.write_text(
        "[a](other.md) [b](other.md#model-and-more) [c `x`](other.md#twice-1) [d](https://example.org/x)\n"
        "`[e](nowhere)` "
        "![f](gone.png) [g](gone.md) [h](other.md#no-heading) [i](#nothing)\n```\n[j](nowhere.md)\n```\n"
    )
    assert broken_links(page) == ["gone.png", "gone.md", "other.md#no-heading", "#nothing"]


def test_every_page_is_on_the_site():
    index = (DOCS / "index.md").read_text()
    listed = {
        line for tree in TOCTREE.findall(index) for line in tree.splitlines() if line and not line.startswith(":")
    }
    assert listed == {page.stem for page in DOCS.glob("*.md")} - {"index"}


def test_readme_is_read_in_three_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_readme_names_every_command():
    readme = (ROOT / "README.md").read_text()
    commands = {path.stem for path in (ROOT / "sorted_ds" / "commands").glob("*.py")} - NO_COMMANDS
    assert [name for name in commands if f"sorted-ds {name}" not in readme] == []


def reference_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "tools" / "reference.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_the_run_file_page_is_made_of_the_config_as_it_is():
    page = (DOCS / "run-file.md").read_text()
    assert page == reference_tool().page(), "run `python tools/reference.py`"
    assert [path for path in known_keys() if f"`{path[-1]}`" not in page and f"`[{path[-1]}]`" not in page] == []


def test_every_key_of_the_run_file_says_what_it_is():
    rows = re.findall(r"^\| `.+$", (DOCS / "run-file.md").read_text().partition("## DeepSpeed JSON")[0], re.MULTILINE)
    assert [row for row in rows if row.rstrip(" |").count(" | ") < 3] == []
