"""The digest of code changes with what is computed, and with nothing else."""

from pathlib import Path

import pytest

from benchmarks import matrix
from benchmarks.digest import code_digest, digest
from tests.spawn import ROOT

SOURCE = '''
"""Where this stands."""
import math
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from sorted_ds.base.errors import UserError

RATE = 0.5
"""The dropout rate."""


class Base:
    """What is shared."""

    limit: int = 3
    """A field."""

    def capped(self, value: Tensor) -> Tensor:
        return value.clamp(max=self.limit)


class Layer(Base):
    def __init__(self, first: Tensor, second: Tensor):
        self.first = first.clone()
        self.second = second.clone()

    def product(self, *, left: Tensor, right: Tensor) -> Tensor:
        """A docstring."""
        total = self.capped(self.first @ left)  # a comment
        return total - right.exp() + self.second

    def run(self, case, parts: list[Tensor]) -> Tensor:
        if case.stage > 2:
            raise UserError(f"stage {case.stage} is refused")
        assert parts, "nothing to add"
        print("running", case.stage)
        added = [scaled(part, factor=RATE) for part in parts]
        return self.product(left=added[0], right=F.relu(added[1])) / case.clip


def scaled(value: Tensor, factor: float) -> Tensor:
    grown = value * factor
    grown = grown + 1
    return grown


def main(layer: Layer, case) -> Tensor:
    with mock.patch.object(Layer, "capped"), mock.patch("sorted_ds.a.scaled"):
        return layer.run(case, [torch.zeros(2), torch.ones(2)]) * math.pi
'''
CASE = """
class Case:
    stage: int
    clip: float
"""


def digest_of(source: str, case: str = CASE, **more: str) -> str:
    return digest({"sorted_ds.a": source, "sorted_ds.case": case, **more})


def edited(*changes: tuple[str, str]) -> str:
    source = SOURCE
    for old, new in changes:
        assert old in source
        source = source.replace(old, new)
    return source


@pytest.mark.parametrize(
    "changes",
    [
        [("grown", "result")],
        [("total", "amount")],
        [("for part in parts", "for one in parts"), ("scaled(part,", "scaled(one,")],
        [("scaled", "multiplied")],
        [("Layer", "Half")],
        [("product", "joined")],
        [("capped", "limited")],
        [("self.first", "self.own"), ("self.limit", "self.most"), ("limit: int", "most: int")],
        [("left", "one"), ("right", "other")],
        [("factor", "by")],
        [("RATE", "SPEED")],
        [("value: Tensor", "value")],
        [(" -> Tensor", "")],
        [("Where this stands.", "Another place."), ("A docstring.", "Another."), ("  # a comment", "")],
        [("is refused", "cannot be"), ("{case.stage} ", ""), ("nothing to add", "empty"), ("running", "at")],
        [("functional as F", "functional as functions"), ("F.relu", "functions.relu")],
        [("import math", "from math import pi as circle"), ("math.pi", "circle")],
        [("RATE = 0.5", "RATE: float = 0.5")],
    ],
    ids=lambda changes: f"{changes[0][0].strip()} to {changes[0][1].strip()}",
)
def test_names_comments_annotations_and_messages_do_not_change_it(changes):
    assert digest_of(edited(*changes)) == digest_of(SOURCE)


def test_a_field_is_renamed_in_two_modules():
    source, case = (text.replace("stage", "level") for text in (SOURCE, CASE))
    assert digest_of(source, case) == digest_of(SOURCE)


def test_a_function_that_moves_to_another_file_does_not_change_it():
    start, stop = SOURCE.index("def scaled"), SOURCE.index("def main")
    rest = f"from sorted_ds.b import scaled\n{SOURCE[:start]}{SOURCE[stop:]}".replace("sorted_ds.a.", "sorted_ds.b.")
    moved = f"from torch import Tensor\n{SOURCE[start:stop]}"
    assert digest_of(rest, **{"sorted_ds.b": moved}) == digest_of(SOURCE)
    by_module = rest.replace("from sorted_ds.b import scaled", "from sorted_ds import b").replace(
        "scaled(", "b.scaled("
    )
    assert digest_of(by_module, **{"sorted_ds.b": moved}) == digest_of(SOURCE)
    through = rest.replace("sorted_ds.b", "sorted_ds.c")
    assert digest_of(through, **{"sorted_ds.b": moved, "sorted_ds.c": "from sorted_ds.b import scaled"}) == digest_of(
        SOURCE
    )


def test_the_order_of_functions_and_methods_does_not_change_it():
    start, stop = SOURCE.index("def scaled"), SOURCE.index("def main")
    assert digest_of(SOURCE[:start] + SOURCE[stop:] + SOURCE[start:stop]) == digest_of(SOURCE)
    start, stop = SOURCE.index("    def product"), SOURCE.index("    def run")
    end = SOURCE.index("def scaled")
    assert digest_of(SOURCE[:start] + SOURCE[stop:end] + SOURCE[start:stop] + SOURCE[end:]) == digest_of(SOURCE)


@pytest.mark.parametrize(
    "changes",
    [
        [("value * factor", "value / factor")],
        [("value * factor", "factor * value")],
        [("grown + 1", "grown + 2")],
        [("grown + 1", "grown + 1.0")],
        [("RATE = 0.5", "RATE = 0.25")],
        [("limit: int = 3", "limit: int = 4")],
        [("case.stage > 2", "case.stage >= 2")],
        [("F.relu", "F.gelu")],
        [("functional as F", "init as F")],
        [("math.pi", "math.e")],
        [(".clamp(max=", ".clamp(min=")],
        [(".exp()", ".log()")],
        [("self.first @ left", "self.second @ left")],
        [("self.capped(self.first @ left)", "self.first @ left")],
        [("left=added[0], right=F.relu(added[1])", "right=added[0], left=F.relu(added[1])")],
        [("total - right", "right - total")],
        [("grown = value * factor\n    grown = grown + 1", "grown = value + 1\n    grown = grown * factor")],
        [("            raise UserError", "            UserError")],
        [('        assert parts, "nothing to add"\n', "")],
        [('mock.patch.object(Layer, "capped"), ', "")],
        [('(Layer, "capped")', '(Layer, "product")')],
        [("class Layer(Base)", "class Layer")],
        [("first.clone()", "first")],
        [("__init__", "start")],
    ],
    ids=lambda changes: f"{changes[0][0].strip()} to {changes[0][1].strip()}",
)
def test_what_is_computed_changes_it(changes):
    assert digest_of(edited(*changes)) != digest_of(SOURCE)


def test_the_arguments_of_what_is_only_called_error_are_no_message():
    bounds = "class Error:\n    weights: float\nBOUND = Error({})\n"
    assert digest({"tests.a": bounds.format("1e-6")}) != digest({"tests.a": bounds.format("1e-5")})
    raised = "class Error(ValueError):\n    pass\ndef f():\n    return Error({})\n"
    assert digest({"tests.a": raised.format("'no'")}) == digest({"tests.a": raised.format("'not'")})


def copied(folder: Path, old: str = "", new: str = "") -> Path:
    """The covered files, and those around them, with every `old` replaced."""
    for path in (*ROOT.glob("sorted_ds/**/*.py"), *ROOT.glob("tests/*.py")):
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text()
        copy.write_text(text.replace(old, new) if old else text)
    return folder


def test_the_matrixs_own_digest_covers_its_bounds_and_not_its_names(tmp_path):
    assert code_digest(copied(tmp_path / "same"), matrix.CODE) == matrix.code_digest()
    renamed = copied(tmp_path / "renamed", "_clean_accumulators", "_wipe")
    assert code_digest(renamed, matrix.CODE) == matrix.code_digest()
    bounds = copied(tmp_path / "bounds", "STATIC_BOUND = 1.25", "STATIC_BOUND = 1.5")
    assert code_digest(bounds, matrix.CODE) != matrix.code_digest()


@pytest.mark.parametrize("pattern", matrix.CODE)
def test_every_pattern_of_the_matrix_finds_files(pattern):
    assert list(ROOT.glob(pattern))
