"""The project's rules as tests: who may import whom, deepspeed in one place, shipped run files that are valid."""

import ast
import json
import re
from pathlib import Path

import pytest
from sorted_ds.run.resolve import space_of, vocabulary

from sorted_ds.engine.modes import check_modes
from sorted_ds.run.model_config import model_config
from sorted_ds.run.run_file import load_engine_config, load_run

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sorted_ds"

LINE = [
    *("errors", "files", "shuffle", "ancestors", "extensions", "stop", "watchdog", "slurm", "rendezvous"),
    "neighbours",
    *("space", "config", "identity", "run_file", "ranks", "schedule", "learning_rate"),
    *("nested", "data", "loss", "engine", "checkpoint"),
    *(
        "model_config",
        "resolve",
        "traffic",
        "plan",
        "model_dir",
        "tables",
        "figure",
        "evaluate",
        "select",
        "model_card",
        "export",
    ),
    *("assemble", "launcher", "monitor", "run_dir", "train", "commands", "cli", "rank"),
]
"""Whoever stands later may import from earlier, never the reverse."""

KNOWS_ONLY = {
    "files": {"errors"},
    "ancestors": set(),
    "neighbours": {"ancestors"},
    "extensions": set(),
    "shuffle": set(),
    "stop": {"errors"},
    "watchdog": set(),
    "slurm": {"errors"},
    "rendezvous": {"errors"},
    "space": {"errors"},
    "schedule": {"errors", "shuffle", "space"},
    "nested": {"errors", "space"},
    "data": {"errors", "files", "shuffle"},
    "loss": {"nested"},
    "traffic": set(),
    "engine": {"errors", "space", "config", "ranks", "nested", "loss"},
    "checkpoint": {"errors", "files", "identity", "ranks", "engine"},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def component(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def own(path: Path) -> set[str]:
    """The components of this package that a file imports."""
    names = {name.split(".")[1] for name in imported(path) if name.startswith("sorted_ds.")}
    return names - {component(path)}


def test_every_module_stands_on_the_line():
    assert {component(path) for path in modules()} - {"__init__"} == set(LINE)


def test_imports_go_one_way():
    for path in modules():
        if component(path) != "__init__":
            later = {name for name in own(path) if LINE.index(name) > LINE.index(component(path))}
            assert not later, f"{path.relative_to(ROOT)} imports {later}"


@pytest.mark.parametrize("name", KNOWS_ONLY)
def test_the_core_knows_only_what_it_needs(name):
    for path in modules():
        if component(path) == name:
            assert own(path) <= KNOWS_ONLY[name], path


def test_deepspeed_is_imported_in_one_place():
    importers = {component(p) for p in modules() if any(n.split(".")[0] == "deepspeed" for n in imported(p))}
    assert importers == {"engine"}


def test_nothing_is_unpickled_no_shell_asked_and_no_remote_code_trusted():
    for path in modules():
        text = path.read_text()
        assert "pickle" not in imported(path), path
        assert not re.search(r"torch\.load|trust_remote_code=True|shell=True|weights_only=False", text), path
        for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert given.get("shell", "False") == given.get("allow_pickle", "False") == "False", path
            assert ast.unparse(call.func) not in ("os.system", "os.popen", "eval", "exec"), path


def function(path: Path, name: str) -> ast.FunctionDef:
    return next(n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef) and n.name == name)


def test_the_loop_stays_short_and_knows_no_deepspeed():
    loop = function(PACKAGE / "train.py", "train")
    assert loop.end_lineno - loop.lineno < 65
    assert "deepspeed." not in re.sub(r"engine\.deepspeed_config", "", ast.unparse(loop))


def test_files_and_functions_stay_small():
    for path in modules():
        tree = ast.parse(path.read_text())
        assert len(path.read_text().splitlines()) <= 320, path
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 65, f"{path}: {node.name}"


def test_every_public_module_says_where_it_stands():
    assert [path for path in modules() if path.read_text() and not ast.get_docstring(ast.parse(path.read_text()))] == []


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "runs").glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_run_file_is_valid(path):
    run = load_run(path)
    if not run.engine.deepspeed.exists():  # text.toml is to be copied, with one of these beside it
        run = load_run(path, [f"engine.deepspeed=../../ds_configs/{run.engine.deepspeed.name}"])
    config = model_config(run, vocabulary(run))
    assert len(space_of(run, config)) > 1
    check_modes(load_engine_config(run.engine.deepspeed), run.engine.deepspeed.name)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.name)
def test_every_shipped_deepspeed_json_is_a_proven_mode(path):
    check_modes(load_engine_config(path), path.name)
    assert json.loads(path.read_text()).get("zero_optimization", {}).get("stage", 0) == int(path.stem[4])
