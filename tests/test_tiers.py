"""The tiers of tests: what `make test` says of what it leaves out, and how `make test-all` runs and goes on."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.spawn import ROOT

TESTS = """
import pytest

def test_of_the_first_tier():
    pass

@pytest.mark.long
@pytest.mark.parametrize("number", range(3))
def test_of_the_second_tier(number):
    assert number != {failing}

@pytest.mark.long
def test_that_may_be_skipped():
    if {skipped}:
        pytest.skip("nothing to run it with")
"""


def file_of_tests(folder: Path, failing: int = 9, skipped: bool = False) -> Path:
    path = folder / "tests" / "test_some.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(TESTS.format(failing=failing, skipped=skipped))
    return path


def run_pytest(folder: Path, *more: str | Path) -> subprocess.CompletedProcess:
    """The first tier, with the plugin and the settings of this project."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.tiers", "-c", str(ROOT / "pyproject.toml")]
    command += ["--rootdir", str(folder), "-p", "no:cacheprovider", "-m", "not long", *map(str, more)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("workers", [(), ("-n", "2")])
def test_the_summary_says_how_many_tests_were_left_out_and_how_to_run_them(tmp_path, workers):
    done = run_pytest(tmp_path, file_of_tests(tmp_path), *workers)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
    assert "\n4 tests of the second tier were not run: make test-all\n" in done.stdout


def test_a_test_that_ci_runs_by_its_mark_is_of_the_second_tier(tmp_path):
    path = file_of_tests(tmp_path)
    path.write_text(path.read_text().replace("@pytest.mark.long\ndef", "@pytest.mark.ci\ndef"))
    done = run_pytest(tmp_path, path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "test_that_may_be_skipped has the mark 'ci'. Add the mark 'long'." in done.stdout + done.stderr


def loaded(monkeypatch) -> ModuleType:
    """tools/test_all.py."""
    spec = importlib.util.spec_from_file_location("test_all", ROOT / "tools" / "test_all.py")
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "test_all", tool)
    spec.loader.exec_module(tool)
    return tool


@pytest.fixture
def tool(tmp_path, monkeypatch) -> ModuleType:
    """tools/test_all.py in a project with one file of tests."""
    tool = loaded(monkeypatch)
    file_of_tests(tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -rs\nmarkers =\n    long: second tier\n")
    (tmp_path / ".gitignore").write_text(".cache\n__pycache__\n.pytest_cache\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "benchmarks.md").write_text("# Times\n\n## First\ntext\n")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        author = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *author, *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "KEPT", tmp_path / ".cache" / "test_all.jsonl")
    monkeypatch.setattr(tool, "RECORD", tmp_path / "docs" / "benchmarks.md")
    monkeypatch.setattr(tool, "run_matrix", lambda minutes: tool.Result("matrix", 200, seconds=60 * minutes))
    return tool


def test_what_passed_is_recorded_and_not_run_again_with_the_same_code(tool, tmp_path, capfd):
    assert tool.main(["--record", "--minutes", "45"]) == 0
    said = capfd.readouterr().out
    assert "2 names, 0 of them passed before with this code" in said
    (line,) = [line for line in (tmp_path / "docs" / "benchmarks.md").read_text().splitlines() if line[:2] == "- "]
    assert line in said
    assert ": 4 tests and 200 modes of the matrix passed, 45 minutes in all" in line
    (tmp_path / "docs" / "page.md").write_text("A document.\n")
    assert tool.main([]) == 0
    assert "2 names, 2 of them passed before with this code" in capfd.readouterr().out
    (tmp_path / "tests" / "test_other.py").write_text("def test_it():\n    pass\n")
    assert tool.main(["some"]) == 0
    said = capfd.readouterr().out
    assert "1 names, 0 of them passed before" in said
    assert "1 names were not chosen: make test-all runs them too" in said
    assert "modes of the matrix passed" not in said


@pytest.mark.parametrize(("failing", "skipped", "told"), [(1, False, "FAILED"), (9, True, "skipped")])
def test_what_fails_or_is_skipped_is_shown_and_runs_again(tool, tmp_path, capfd, failing, skipped, told):
    file_of_tests(tmp_path, failing, skipped)
    assert tool.main(["--record"]) == 1
    said = capfd.readouterr().out
    assert f"tests/test_some.py: {told} in " in said
    assert ("assert 1 != 1" if failing == 1 else "nothing to run it with") in said
    assert "- " not in (tmp_path / "docs" / "benchmarks.md").read_text()
    assert tool.main([]) == 1
    assert "2 names, 1 of them passed before with this code" in capfd.readouterr().out


def test_a_file_that_cannot_be_run_is_a_failure(tool, tmp_path):
    assert tool.run_tests("tests/test_absent.py", tool.threading.Lock()).failed == 1
    (tmp_path / "tests" / "test_broken.py").write_text("def\n")
    with pytest.raises(SystemExit, match="cannot be collected"):
        tool.main([])


def test_a_word_that_is_in_no_name_is_an_error_that_lists_the_names(tool):
    with pytest.raises(SystemExit, match=r"no name contains 'slurn'\. Names: tests/test_some\.py, matrix"):
        tool.main(["slurn"])


def test_lines_are_added_below_their_heading(tool, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Times\n\n## make test-all\n\n- one\n\n## More\ntext\n")
    tool.record(page, "- two")
    assert page.read_text() == "# Times\n\n## make test-all\n\n- one\n- two\n\n## More\ntext\n"


@pytest.mark.parametrize(
    ("said", "code", "passed"),
    [
        ("30 of 100 modes, 0 outside their bounds", 0, True),
        ("error: 30 of 100 modes, 2 outside their bounds", 1, False),
        ("error: 0 of 100 modes, 0 outside their bounds", 1, False),
        ("Traceback", 1, False),
    ],
)
def test_a_sample_of_the_matrix_that_fails_is_a_failure(tmp_path, monkeypatch, said, code, passed):
    tool = loaded(monkeypatch)
    monkeypatch.setattr(tool, "log_of", lambda name: tmp_path / name)
    monkeypatch.setattr(tool, "logged", lambda name, *module: ((tmp_path / name).write_text(said), code))
    assert tool.run_matrix(1.0).passed is passed
