"""A digest of what code computes. Names, comments, docstrings, messages and the places of files do not change it.

In: Python files. Out: 16 hexadecimal digits. The matrix of modes takes hours: a renaming must not void it, and a change
of what is computed must.

Each function, class and other statement at the top of a module gets a *colour*: a hash of its syntax tree, without
docstrings, annotations, imports and messages. In it,
- a local variable is the number of its first use;
- a function, class, constant or attribute of `self` that we define is the colour of its definition. Colours depend on
  colours, so they are computed in rounds; in the first, all that we define look the same;
- a keyword of a function or class that we define is the place of the parameter or field;
- another attribute of ours is the number of its first use, since we do not know the object's class. That `case.stage`
  became `case.clip_norm` is not seen if neither is used elsewhere in the function;
- a name of another package stays as it is spelled. So does an attribute of ours that PyTorch, Hugging Face or Python
  has too, such as `forward` or `step`: to rename it changes the digest.
The digest is the hash of all colours, sorted, so it depends on no file and no order of functions or methods.
"""

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.canonical import Program, Writer, hashed
from benchmarks.syntax import attributes_of, defined, imports, is_left_out, others_names, own_nodes

ROUNDS = 4
"""A changed function changes its own colour at once, and in each round the colours of those that name it."""


def code_digest(root: Path, patterns: Iterable[str]) -> str:
    """Returns the digest of the files under `root` that match."""
    paths = sorted({path for pattern in patterns for path in root.glob(pattern)})
    covered = {_module_of(path, root): path.read_text() for path in paths}
    return digest(covered, _imported_modules(covered, root))


def digest(covered: Mapping[str, str], around: Mapping[str, str] | None = None) -> str:
    """Returns the digest of modules, given as sources by name.

    `around`: other modules of ours that these import from. Only the names of their attributes are used.
    """
    trees = {name: ast.parse(source) for name, source in covered.items()}
    others = [ast.parse(source) for source in (around or {}).values()]
    program = Program(trees, frozenset(attributes_of([*trees.values(), *others])) - others_names())
    for module, tree in trees.items():
        program.imports[module] = dict(imports(own_nodes(tree), module))
        program.definitions |= {(module, name): node for node in tree.body for name in defined(node)}
    for _ in range(ROUNDS):
        colours = _next_round(program)
    return hashed(*sorted(colours))[:16]


def _next_round(program: Program) -> list[str]:
    """Returns the colours of all statements, and gives them to the names that these define."""
    all_colours, colours, members = [], {}, {}
    for module, tree in program.trees.items():
        for statement in tree.body:
            if not is_left_out(statement):
                writer = Writer(program, module)
                all_colours.append(writer.colour_of(statement))
                names = enumerate(defined(statement))
                colours.update({(module, name): hashed(all_colours[-1], str(number)) for number, name in names})
                members.update({(module, name): own for name, own in writer.members.items()})
    program.colours, program.members = colours, members
    return all_colours


def _module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported_modules(covered: Mapping[str, str], root: Path) -> dict[str, str]:
    """Returns the sources of our other modules that covered ones import from: of a package, all its modules."""
    found = {}
    for name, source in covered.items():
        for _, target in imports(ast.walk(ast.parse(source)), name):
            if target.ours:
                place = root.joinpath(*target.path.split("."))
                paths = (place.with_suffix(".py"), *sorted(place.glob("*.py")))
                found.update({_module_of(path, root): path.read_text() for path in paths if path.is_file()})
    return {name: source for name, source in found.items() if name not in covered}
