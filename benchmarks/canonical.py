"""Writes a statement of Python as a list of strings that depends on no name, comment or message: see digest.py."""

import ast
import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.syntax import (
    NamedFunction,
    Target,
    accepted,
    bindings,
    defined,
    first_parameter,
    is_left_out,
    is_ours,
    members,
    others_names,
    set_on,
)

NOT_COMPUTED = ("annotation", "returns", "type_comment", "type_params", "ctx", "kind")
"""Fields of syntax nodes that are not written."""
TAKES_ATTRIBUTE_NAME = ("getattr", "setattr", "hasattr", "delattr", "unittest.mock.patch.object")
"""Functions whose second argument is the name of an attribute of the first."""
TELLS = ("print", "warnings.warn")
"""Functions whose texts are messages. So are those of exceptions."""
TAKES_OUR_KEYWORDS = ("dataclasses.replace", "functools.partial", "unittest.mock.patch.multiple")
"""Functions of others whose keywords are names of ours."""
ERRORS = ("Error", "Exception", "Warning")
"""How the names of exceptions end."""

Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


@dataclass
class Program:
    """The covered modules by name, and the colours of the last round."""

    trees: dict[str, ast.Module]
    attributes: frozenset[str]
    """Names of methods, fields and attributes that our classes define."""
    imports: dict[str, dict[str, Target]] = field(default_factory=dict)
    definitions: dict[tuple[str, str], ast.stmt] = field(default_factory=dict)
    """By (module, name)."""
    colours: dict[tuple[str, str], str] = field(default_factory=dict)
    """The colours of definitions."""
    members: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    """For each class, the colours of the attributes of `self`, by their names."""

    def resolved(self, target: Target) -> Target:
        """Follows imports to the covered module that defines a name."""
        while target.ours and target.name and (target.path, target.name) not in self.definitions:
            if f"{target.path}.{target.name}" in self.trees:
                return Target(f"{target.path}.{target.name}", ours=True)
            further = self.imports.get(target.path, {}).get(target.name)
            if further is None:
                return target
            target = further
        return target


def hashed(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class Writer:
    """Writes one statement of a module as a list of strings that depends on no spelling of ours."""

    def __init__(self, program: Program, module: str):
        self.program, self.module = program, module
        self.written: list[str] = []
        self.numbers: dict[str, int] = {}
        """Names of ours whose definition we do not see, by their first use."""
        self.scopes: list[dict[str, int | Target | None]] = []
        """The names that each function around binds: the number of the first use, or what an import gives."""
        self.owner: ast.ClassDef | None = None
        """The class around."""
        self.first = ""
        """The first parameter of the method around."""
        self.members: dict[str, dict[str, str]] = defaultdict(dict)
        """By the name of a class."""

    def colour_of(self, node: ast.AST) -> str:
        before = self.written, self.numbers
        self.written, self.numbers = [], {}
        self.write(node)
        colour = hashed(*self.written)
        self.written, self.numbers = before
        return colour

    def say(self, *parts: object) -> None:
        self.written.append(" ".join(map(str, parts)))

    def write(self, node: object) -> None:
        if isinstance(node, list | tuple):
            for part in node:
                self.write(part)
            self.say("end")
        elif isinstance(node, ast.AST):
            if not (isinstance(node, ast.stmt) and is_left_out(node)):
                SPECIAL.get(type(node), Writer._fields)(self, node)
        else:
            self.say(type(node).__name__, repr(node))

    def _fields(self, node: ast.AST) -> None:
        self.say(type(node).__name__)
        for name, value in ast.iter_fields(node):
            if name not in NOT_COMPUTED:
                self.write(value)

    # Definitions

    def _function(self, node: NamedFunction) -> None:
        is_method, owner, first = self.owner is not None and not self.scopes, self.owner, self.first
        self.say(type(node).__name__)
        if is_method:
            self.say(node.name if node.name in others_names() or node.name.startswith("__") else "a method")
            self.first = first_parameter(node)
        elif self.scopes:
            self.say(self._name(node.name))
        self.write(node.decorator_list)
        self._signature_and_body(node, node.body)
        self.owner, self.first = owner, first

    def _lambda(self, node: ast.Lambda) -> None:
        self.say("Lambda")
        self._signature_and_body(node, node.body)

    def _signature_and_body(self, node: NamedFunction | ast.Lambda, body: object) -> None:
        given = node.args
        self.write([given.defaults, given.kw_defaults])
        self.scopes.append(dict(bindings(node)))
        for kind in (given.posonlyargs, given.args, [given.vararg], given.kwonlyargs, [given.kwarg]):
            self.say("parameters", *(self._name(argument.arg) for argument in kind if argument))
        self.write(body)
        self.scopes.pop()

    def _class(self, node: ast.ClassDef) -> None:
        self.say("ClassDef", self._name(node.name) if self.scopes else "")
        self.write([node.decorator_list, node.bases, node.keywords])
        if self.scopes:  # in a function
            self.write(node.body)
            return
        self.owner = node
        methods = [statement for statement in node.body if isinstance(statement, NamedFunction)]
        colours = {id(method): self.colour_of(method) for method in methods}
        for statement in node.body:
            if id(statement) not in colours:
                self.write(statement)
        self.say(*sorted(colours.values()))
        self.owner = None
        self._keep_members(node, colours)

    def _keep_members(self, node: ast.ClassDef, colours: Mapping[int, str]) -> None:
        sites = defaultdict(list)
        fields = [name for statement in node.body if id(statement) not in colours for name in defined(statement)]
        for number, name in enumerate(fields):
            sites[name].append(hashed("field", str(number), *self.written))
        for method in (statement for statement in node.body if isinstance(statement, NamedFunction)):
            colour = colours[id(method)]
            sites[method.name].append(colour)
            names = (name for inside in ast.walk(method) for name in set_on(inside, first_parameter(method)))
            for number, name in enumerate(dict.fromkeys(names)):
                sites[name].append(hashed("attribute", str(number), colour))
        self.members[node.name] = {name: hashed(*sorted(own)) for name, own in sites.items()}

    def _annotated(self, node: ast.AnnAssign) -> None:
        is_field = self.owner is not None and not self.scopes
        if is_field or node.value is not None:
            self.say("field" if is_field else "Assign")
            self.write([[node.target], node.value])

    def _assignment(self, node: ast.Assign) -> None:
        self.say("Assign")
        self.write([node.targets, node.value])

    def _comprehension(self, node: Comprehension) -> None:
        """What it iterates over first: that binds its names."""
        targets = (name for part in node.generators for name in ast.walk(part.target) if isinstance(name, ast.Name))
        self.scopes.append({name.id: None for name in targets})
        self.say(type(node).__name__)
        self.write([node.generators, *(value for key, value in ast.iter_fields(node) if key != "generators")])
        self.scopes.pop()

    def _handler(self, node: ast.ExceptHandler) -> None:
        self.say("ExceptHandler", self._name(node.name) if node.name else "")
        self.write([node.type, node.body])

    # Messages

    def _raise(self, node: ast.Raise) -> None:
        self.say("Raise")
        self.write([node.exc.func if isinstance(node.exc, ast.Call) else node.exc, node.cause])

    def _assertion(self, node: ast.Assert) -> None:
        self.say("Assert")
        self.write(node.test)

    def _is_error(self, target: Target | None) -> bool:
        """Whether it is a class of exceptions, whose arguments are a message."""
        if target is None:
            return False
        definition = self.program.definitions.get((target.path, target.name))
        if isinstance(definition, ast.ClassDef):
            return any(ast.unparse(base).endswith(ERRORS) for base in definition.bases)
        return (target.name or target.path).endswith(ERRORS)

    # Calls

    def _call(self, node: ast.Call) -> None:
        target = self._refers_to(node.func)
        self.say("Call")
        self.write(node.func)
        if self._is_error(target):
            return
        path = "" if target is None or target.ours else target.path
        arguments, text = list(node.args), None
        position = 1 if path in TAKES_ATTRIBUTE_NAME else 0
        if len(arguments) > position and isinstance(arguments[position], ast.Constant):
            text = arguments[position].value
        if isinstance(text, str) and path in TAKES_ATTRIBUTE_NAME:
            self.say(self._attribute(arguments[0], text))
            del arguments[1]
        elif isinstance(text, str) and path == "unittest.mock.patch" and is_ours(text):
            self.say(self._target(Target(*text.rpartition(".")[::2], ours=True)))
            del arguments[0]
        self.write([argument for argument in arguments if not (path in TELLS and _is_text(argument))])
        for keyword in node.keywords:
            self.say("keyword", self._keyword(keyword.arg, target, node.func))
            self.write(keyword.value)

    def _keyword(self, name: str | None, target: Target | None, function: ast.expr) -> str:
        if name is None:
            return "all"
        definition = self._definition(target, function)
        if definition is not None:
            names = accepted(definition)
            return f"at {names.index(name)}" if name in names else self._number(name)
        is_unknown = target is None and not (
            isinstance(function, ast.Attribute) and function.attr not in self.program.attributes
        )
        is_ours = target is not None and (target.ours or target.path in TAKES_OUR_KEYWORDS)
        return self._number(name) if is_unknown or is_ours else name

    def _definition(self, target: Target | None, function: ast.expr) -> ast.stmt | None:
        """The function or class that is called, if we see it."""
        if target is not None:
            found = self.program.definitions.get((target.path, target.name))
            return found if isinstance(found, NamedFunction | ast.ClassDef) else None
        if isinstance(function, ast.Attribute) and self._is_self(function.value) and self.owner is not None:
            methods = (statement for statement in self.owner.body if isinstance(statement, NamedFunction))
            return next((method for method in methods if method.name == function.attr), None)
        return None

    # Names

    def _variable(self, node: ast.Name) -> None:
        self.say(self._name(node.id))

    def _dotted(self, node: ast.Attribute) -> None:
        target = self._refers_to(node)
        if target is not None:
            self.say(self._target(target))
            return
        self.say("Attribute", self._attribute(node.value, node.attr))
        self.write(node.value)

    def _attribute(self, value: ast.expr, name: str) -> str:
        """`name` behind a dot after `value`."""
        if self._is_self(value) and self.owner is not None:
            return self._member(Target(self.module, self.owner.name, ours=True), name)
        target = self._refers_to(value)
        if target is not None and (target.path, target.name) in self.program.definitions:
            return self._member(target, name)
        return self._number(name) if name in self.program.attributes else name

    def _is_self(self, value: ast.expr) -> bool:
        return isinstance(value, ast.Name) and value.id == self.first != ""

    def _member(self, owner: Target, name: str) -> str:
        """The colour of what a class of ours, or one that it extends, calls `name`."""
        key = (owner.path, owner.name)
        definition = self.program.definitions.get(key)
        if name in self.program.attributes and isinstance(definition, ast.ClassDef):
            if name in members(definition):
                return f"member {self.program.members.get(key, {}).get(name, '')}"
            for base in definition.bases:
                further = Writer(self.program, owner.path)._refers_to(base)
                if further is not None and further.ours and further.name and further != owner:
                    return self._member(further, name)
        return self._number(name) if name in self.program.attributes else name

    def _name(self, name: str) -> str:
        for level, scope in enumerate(reversed(self.scopes)):
            if name in scope:
                found = scope[name]
                if isinstance(found, Target):
                    return self._target(found)
                if found is None:
                    found = scope[name] = sum(isinstance(number, int) for number in scope.values())
                return f"local {level} {found}"
        if self.owner is not None and not self.scopes and name in members(self.owner):
            return self._member(Target(self.module, self.owner.name, ours=True), name)
        return self._target(self._global(name))

    def _global(self, name: str) -> Target:
        """What a name refers to at the top of the module."""
        if (self.module, name) in self.program.definitions:
            return Target(self.module, name, ours=True)
        return self.program.resolved(self.program.imports[self.module].get(name, Target(name)))

    def _target(self, target: Target) -> str:
        target = self.program.resolved(target)
        if not target.ours:
            return f"other {target.path}"
        if (target.path, target.name) in self.program.definitions:
            return f"ours {self.program.colours.get((target.path, target.name), '')}"
        return self._number(target.name or target.path)

    def _number(self, name: str) -> str:
        return f"ours {self.numbers.setdefault(name, len(self.numbers))}"

    def _refers_to(self, node: ast.AST) -> Target | None:
        """What an expression refers to: a definition or a module of ours, or what others define. None otherwise."""
        if isinstance(node, ast.Attribute):
            parent = self._refers_to(node.value)
            if parent is None or (parent.ours and parent.name):
                return None
            inside = Target(parent.path, node.attr, ours=True)
            return self.program.resolved(inside) if parent.ours else Target(f"{parent.path}.{node.attr}")
        if not isinstance(node, ast.Name):
            return None
        for scope in reversed(self.scopes):
            if node.id in scope:
                found = scope[node.id]
                return self.program.resolved(found) if isinstance(found, Target) else None
        if self.owner is not None and not self.scopes and node.id in members(self.owner):
            return None
        return self._global(node.id)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


SPECIAL: dict[type[ast.AST], Callable[[Writer, Any], None]] = {
    ast.FunctionDef: Writer._function,
    ast.AsyncFunctionDef: Writer._function,
    ast.Lambda: Writer._lambda,
    ast.ClassDef: Writer._class,
    ast.AnnAssign: Writer._annotated,
    ast.Assign: Writer._assignment,
    ast.ExceptHandler: Writer._handler,
    ast.Raise: Writer._raise,
    ast.Assert: Writer._assertion,
    ast.Call: Writer._call,
    ast.Name: Writer._variable,
    ast.Attribute: Writer._dotted,
    ast.ListComp: Writer._comprehension,
    ast.SetComp: Writer._comprehension,
    ast.DictComp: Writer._comprehension,
    ast.GeneratorExp: Writer._comprehension,
}
"""How a kind of node is written, unless field by field."""
