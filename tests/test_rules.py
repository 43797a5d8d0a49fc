"""The project's rules as tests: who may import whom, deepspeed in one place, shipped run files that are valid."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import LlamaConfig

from sorted_ds.engine.modes import check_modes
from sorted_ds.families import family_of
from sorted_ds.run.build import space_of
from sorted_ds.run.config import SCRATCH
from sorted_ds.run.model_config import model_config
from sorted_ds.run.run_file import load_engine_config, load_run
from sorted_ds.space import AXES
from sorted_ds.space.axes import DEPTH
from sorted_ds.tasks.causal_lm import data_specs
from tests.chats import PLAIN, chat_tokenizer

ROOT = Path(__file__).parent.parent
SMOLLM2 = {
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49_152,
}
"""The sizes of the model that chat.toml names. The test does not ask the hub."""
PACKAGE = ROOT / "sorted_ds"

LINE = (
    "base",
    "cluster",
    "space",
    "nested",
    "families",
    "data",
    "tasks",
    "engine",
    "checkpoint",
    "deploy",
    "run",
    "commands",
)
"""The folders. One that stands later may import from earlier ones, never the reverse."""

KNOWS_ONLY = {
    "base": set(),
    "cluster": {"base"},
    "space": {"base"},
    "nested": {"base", "space"},
    "families": {"base", "space", "nested"},
    "data": {"base"},
    "tasks": {"base", "space", "nested", "data"},
    "engine": {"base", "cluster", "space", "nested", "data", "tasks"},
    "checkpoint": {"base", "cluster", "space", "engine"},
    "deploy": {"base", "space", "nested", "families", "data", "tasks"},
}
"""The folders that may be imported. `run` and `commands`, which put everything together, may import all before them."""

KNOWS_ONLY_MODULES = {
    "base.errors": set(),
    "base.files": {"base.errors"},
    "base.shuffle": set(),
    "cluster.ancestors": set(),
    "cluster.extensions": set(),
    "cluster.neighbours": {"cluster.ancestors"},
    "cluster.rendezvous": {"base.errors"},
    "cluster.slurm": {"base.errors"},
    "cluster.stop": {"base.errors"},
    "cluster.watchdog": set(),
    "nested.blocks": set(),
    "nested.family": {"base.errors", "space"},
    "nested.owned": {"space"},
    "run.learning_rate": {"run.config"},
    "run.traffic": set(),
    "space.axes": {"base.errors"},
    "space.passes": {"base.shuffle", "space.axes", "space.space"},
    "space.sampling": {"base.errors", "base.shuffle", "space.axes", "space.passes", "space.space"},
    "space.space": {"base.errors", "space.axes"},
}
"""The modules of this package that a module may import, for modules that must be read and changed by themselves."""

FAMILYS_OWN = re.compile(
    r"lm_head|embed_tokens|self_attn|\bmlp\b|[qkvo]_proj|(gate|up|down)_proj|model\.(model|layers)\b"
)
"""Names inside a Hugging Face architecture. Only `families` may write them; others ask the family."""


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def folder(path: Path) -> str:
    """The folder of a module in the package; the package's own `__init__` has none."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def module(path: Path) -> str:
    """The name of a module in the package, like `space.axes`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide what is imported"
            found.add(node.module)
            if node.module == "sorted_ds":  # `from sorted_ds import folder`
                found |= {f"sorted_ds.{alias.name}" for alias in node.names}
    return found


def own(path: Path) -> set[str]:
    """The modules of this package that a file imports, like `space.axes`."""
    return {name.removeprefix("sorted_ds.") for name in imported(path) if name.startswith("sorted_ds.")}


def other_folders(path: Path) -> set[str]:
    return {name.split(".")[0] for name in own(path)} - {folder(path)}


def test_every_module_lies_in_a_folder_of_the_line():
    assert {folder(path) for path in modules()} - {""} == set(LINE)
    assert [path.name for path in modules() if not folder(path)] == ["__init__.py"]


def test_imports_go_one_way():
    for path in modules():
        if folder(path):
            later = {name for name in other_folders(path) if LINE.index(name) > LINE.index(folder(path))}
            assert not later, f"{path.relative_to(ROOT)} imports {later}"


@pytest.mark.parametrize("name", KNOWS_ONLY)
def test_a_folder_knows_only_what_it_needs(name):
    for path in modules():
        if folder(path) == name:
            assert other_folders(path) <= KNOWS_ONLY[name], path


@pytest.mark.parametrize("name", KNOWS_ONLY_MODULES)
def test_the_core_knows_only_what_it_needs(name):
    (path,) = (path for path in modules() if module(path) == name)
    assert own(path) <= KNOWS_ONLY_MODULES[name], path


def test_what_uses_a_trained_family_needs_no_engine_and_the_engine_no_files():
    """Both follow from the tables above; here they are said."""
    for path in modules():
        if folder(path) == "deploy":
            assert not other_folders(path) & {"engine", "checkpoint"}, path
        if folder(path) == "engine":
            assert not other_folders(path) & {"checkpoint", "deploy", "run", "commands"}, path


def constants(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each string that is no docstring, and of each chain of attributes."""
    tree = ast.parse(path.read_text())
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.lineno, node.value
        elif isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)


def test_only_the_families_name_parts_of_an_architecture():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in modules()
        for line, text in (constants(path) if folder(path) != "families" else ())
        if FAMILYS_OWN.search(text)
    ]
    assert found == []


def test_only_the_families_know_the_letters_of_their_axes():
    """Depth is the one that every family has."""
    for path in modules():
        if folder(path) == "families" or module(path) == "space.axes":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                assert node.slice.value not in AXES, f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("SubNet", ".replace")):
                letters = {word.arg for word in node.keywords} & set(AXES)
                assert letters <= {DEPTH}, f"{path}:{node.lineno}"


def test_deepspeed_is_imported_in_one_place():
    importers = {folder(p) for p in modules() if any(n.split(".")[0] == "deepspeed" for n in imported(p))}
    assert importers == {"engine"}


def test_nothing_is_unpickled_no_shell_asked_and_no_remote_code_trusted():
    for path in modules():
        text = path.read_text()
        assert "pickle" not in imported(path), path
        assert not re.search(r"trust_remote_code=True|shell=True|weights_only=False|_object(_list)?\(", text), path
        for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert given.get("shell", "False") == given.get("allow_pickle", "False") == "False", path
            called = ast.unparse(call.func)
            assert called not in ("os.system", "os.popen", "eval", "exec"), path
            assert called != "torch.load" or given.get("weights_only") == "True", path
            if re.search(r"\.from_(pretrained|config)$", called):
                assert given.get("trust_remote_code") == "False", (path, call.lineno)


def function(path: Path, name: str) -> ast.FunctionDef:
    return next(n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef) and n.name == name)


def test_the_loop_stays_short_and_knows_no_deepspeed():
    loop = function(PACKAGE / "run" / "train.py", "train")
    assert loop.end_lineno - loop.lineno < 65
    assert "deepspeed." not in re.sub(r"engine\.deepspeed_config", "", ast.unparse(loop))


def test_files_and_functions_stay_small():
    for path in modules():
        tree = ast.parse(path.read_text())
        assert len(path.read_text().splitlines()) <= 400, path
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 65, f"{path}: {node.name}"


def test_every_public_module_says_where_it_stands():
    assert [path for path in modules() if path.read_text() and not ast.get_docstring(ast.parse(path.read_text()))] == []


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "runs").glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_run_file_is_valid(path, chat_base, tmp_path):
    run = load_run(path)
    overrides = []
    if not run.engine.deepspeed.exists():  # text.toml is to be copied, with one of these beside it
        overrides.append(f"engine.deepspeed=../../ds_configs/{run.engine.deepspeed.name}")
    if run.model.init != SCRATCH:  # chat.toml names a model of the hub
        LlamaConfig(**SMOLLM2).save_pretrained(tmp_path)
        overrides.append(f"model.init={chat_tokenizer(chat_base, tmp_path, PLAIN)}")
    run = load_run(path, overrides)
    for spec in data_specs(run).values():
        spec.reader()
    config = model_config(run)
    assert len(space_of(run, family_of(config.model_type), config)) > 1
    check_modes(load_engine_config(run.engine.deepspeed), run.engine.deepspeed.name)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.name)
def test_every_shipped_deepspeed_json_is_a_proven_mode(path):
    check_modes(load_engine_config(path), path.name)
    assert json.loads(path.read_text()).get("zero_optimization", {}).get("stage", 0) == int(path.stem[4])
