"""What statements of Python define, import and compute, read from their syntax trees."""

import ast
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

OUR_PACKAGES = ("sorted_ds", "tests", "benchmarks")

NamedFunction = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Target:
    """What a name refers to."""

    path: str
    """A module, if it is ours; otherwise the full dotted name."""
    name: str = ""
    """What our module defines. Empty for the module itself."""
    ours: bool = False


def imports(nodes: Iterable[ast.AST], module: str) -> Iterator[tuple[str, Target]]:
    """Yields (name, target) for what the import statements among `nodes` bind."""
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                path = alias.name if alias.asname else alias.name.partition(".")[0]
                yield alias.asname or path, Target(path, ours=is_ours(path))
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            path = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                ours = is_ours(path)
                target = Target(path, alias.name, ours) if ours else Target(f"{path}.{alias.name}")
                yield alias.asname or alias.name, target


def is_ours(path: str) -> bool:
    return path.partition(".")[0] in OUR_PACKAGES


def own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """Yields the nodes of a scope without those of the functions, lambdas and classes inside."""
    for node in ast.iter_child_nodes(scope):
        yield node
        if not isinstance(node, NamedFunction | ast.Lambda | ast.ClassDef):
            yield from own_nodes(node)


def defined(statement: ast.stmt) -> Iterator[str]:
    """Yields the names that a statement at the top of a module or class binds, in order."""
    if isinstance(statement, NamedFunction | ast.ClassDef):
        yield statement.name
        return
    nodes = (statement, *own_nodes(statement))
    yield from dict.fromkeys(n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


def attributes_of(trees: Iterable[ast.AST]) -> Iterator[str]:
    """Yields the names of the methods and fields of classes, and of what methods set on their first parameter."""
    for owner in (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for statement in owner.body:
            yield from defined(statement)
            if isinstance(statement, NamedFunction):
                yield from (name for node in ast.walk(statement) for name in set_on(node, first_parameter(statement)))


def first_parameter(method: NamedFunction) -> str:
    return next((argument.arg for argument in (*method.args.posonlyargs, *method.args.args)), "")


def set_on(node: ast.AST, first: str) -> list[str]:
    is_set = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    return [node.attr] if is_set and isinstance(node.value, ast.Name) and node.value.id == first else []


def is_left_out(statement: ast.stmt) -> bool:
    """Whether it computes nothing: imports, docstrings, `pass`, `__all__`, and what is for type checkers alone."""
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    if isinstance(statement, ast.If):
        return "TYPE_CHECKING" in ast.unparse(statement.test)
    if isinstance(statement, ast.Assign):
        return ast.unparse(statement.targets[0]) == "__all__"
    return isinstance(statement, ast.Import | ast.ImportFrom | ast.Pass | ast.Global | ast.Nonlocal)


def accepted(definition: ast.stmt) -> list[str]:
    """The keywords that a function or class takes, in order."""
    if isinstance(definition, ast.ClassDef):
        methods = [statement for statement in definition.body if isinstance(statement, NamedFunction)]
        if made := [method for method in methods if method.name == "__init__"]:
            return accepted(made[0])[1:]
        return [name for statement in definition.body if statement not in methods for name in defined(statement)]
    assert isinstance(definition, NamedFunction)
    given = definition.args
    return [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]


@cache
def members(owner: ast.ClassDef) -> frozenset[str]:
    return frozenset(attributes_of([owner]))


def bindings(function: NamedFunction | ast.Lambda) -> Iterator[tuple[str, Target | None]]:
    """Yields the names that are local to a function, and what they refer to if that is an import."""
    nodes = list(own_nodes(function))
    loops = [node for node in nodes if isinstance(node, ast.comprehension)]
    of_loops = {id(name) for loop in loops for name in ast.walk(loop.target)}
    elsewhere = {name for node in nodes if isinstance(node, ast.Global | ast.Nonlocal) for name in node.names}
    found: dict[str, Target | None] = {}
    for node in nodes:
        if isinstance(node, ast.arg):
            found[node.arg] = None
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in of_loops:
            found[node.id] = None
        elif isinstance(node, NamedFunction | ast.ClassDef) or (isinstance(node, ast.ExceptHandler) and node.name):
            found[str(node.name)] = None
    found |= imports(nodes, "")
    yield from ((name, target) for name, target in found.items() if name not in elsewhere)


@cache
def others_names() -> frozenset[str]:
    """Returns attribute names of PyTorch, Hugging Face and Python."""
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    classes = (torch.Tensor, torch.nn.Module, torch.autograd.Function, torch.autograd.function.FunctionCtx)
    classes += (torch.optim.Optimizer, torch.Generator, PreTrainedModel, PreTrainedConfig)
    classes += (str, bytes, dict, list, set, tuple, int, float, type, Exception, OrderedDict, Counter, Path, Random)
    return frozenset(name for kind in classes for name in dir(kind)) | {"weight", "bias"}
