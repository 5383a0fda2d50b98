"""Finds what can be changed in the functions of a module, and compiles one change at a time.

operator      changes
arithmetic    + - * / ** // % into another, A @ B into B @ A
comparison    < into <= (the boundary) and every comparison into its opposite
boolean       and, or, not; True and False; a condition into its negation
constant      n into n + 1, c into 2c, 0.0 into 1.0
sign          -x into x
axis          A.T into A
reduction     sum into mean, min into max, and back
graph         x.detach() and x.clone() into x
argument      f(a, b, ...) into f(b, a, ...)
deletion      a call, an augmented assignment or a raise that stands alone into nothing

Docstrings, annotations, default arguments, decorators, assertions and the texts of errors stay, and
so does super().__init__(), without which no module is one.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple, final

ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
BOUNDARY: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}
OPPOSITE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
REDUCTION = {"sum": "mean", "mean": "sum", "min": "max", "max": "min"}
# Their arguments commute, or are no numbers.
UNORDERED = {"max", "min", "maximum", "minimum", "zip", "isinstance", "issubclass", "getattr"}
UNORDERED |= {"hasattr", "setattr", "super", "cast", "partial", "map", "range", "warn", "replace"}
# Parts of a node that say nothing about what is computed.
SKIPPED = {"annotation", "returns", "decorator_list", "args", "type_params", "exc", "cause"}
# Arguments that guard what cannot happen, or that place a warning.
SKIPPED_KEYWORDS = {"strict", "stacklevel"}


Place = tuple[str, int]  # a statement or a function: its file, absolute, and its first line
Change = tuple[str, str, str, str]  # the file, the line's text, what stood there, what stands now


class Mutant(NamedTuple):
    """One change in one function.

    Attributes:
        file: relative to the root of the checkout.
        function: qualified name of the outermost function, without its class's module.
        first: line at which the function starts, decorators included.
        line: line of the change.
        operator: one of those above.
        before: what stood there.
        after: what stands there now.
        place: counts the changes of the function.
        digest: of the function's source, which tells a record of an older one.
    """

    file: str
    function: str
    first: int
    line: int
    operator: str
    before: str
    after: str
    place: int
    digest: str

    @property
    def key(self) -> str:
        """Names the mutant as long as its function's source stays."""
        return f"{self.file}:{self.function}:{self.place}:{self.digest}"


class _Site(NamedTuple):
    """Put `new` at `holder.field` (or at its `index`)."""

    operator: str
    node: ast.AST
    new: ast.AST
    holder: ast.AST
    field: str
    index: int | None

    def put(self, node: ast.AST) -> None:
        if self.index is None:
            setattr(self.holder, self.field, node)
        else:
            getattr(self.holder, self.field)[self.index] = node


@final
class Source:
    """The mutants of one module, read once.

    Args:
        path: the module's file.
        root: the checkout, to which the names of files are relative.
    """

    def __init__(self, path: Path, root: Path) -> None:
        text = path.read_text(encoding="utf-8")
        self.path = str(path.resolve())
        self.file = path.resolve().relative_to(root.resolve()).as_posix()
        self.lines = text.splitlines()
        self.tree = ast.parse(text, str(path))
        self.functions = dict(_functions(self.tree))  # (name, first line) -> its node
        self.statements: dict[int, int] = {}  # line -> first line of the innermost statement
        for node in ast.walk(self.tree):  # outer ones first
            if isinstance(node, ast.stmt):
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                self.statements |= dict.fromkeys(lines, node.lineno)
        self._sites: dict[str, _Site] = {}
        self.mutants = list(self._find(text))

    def statement(self, mutant: Mutant) -> Place:
        """Where the statement begins in which the change is."""
        return self.path, self.statements[mutant.line]

    def body(self, mutant: Mutant) -> set[Place]:
        """All statements of its function."""
        return self.within(mutant.function, mutant.first)

    def within(self, function: str, first: int) -> set[Place]:
        """All statements of the function of that name and first line."""
        lines = range(first, (self.functions[function, first].end_lineno or first) + 1)
        return {(self.path, self.statements[line]) for line in lines if line in self.statements}

    def change(self, mutant: Mutant) -> Change:
        """What names the mutant in the list of reasons, wherever its line is."""
        line = self.lines[mutant.line - 1].strip()
        return mutant.file, line, mutant.before, mutant.after

    def module(self, mutant: Mutant) -> CodeType:
        """The module's code with the change in it."""
        site = self._sites[mutant.key]
        site.put(site.new)
        try:
            return compile(self.tree, self.path, "exec")
        finally:
            site.put(site.node)

    def code(self, mutant: Mutant) -> CodeType:
        """The function's code with the change in it."""
        return function_code(self.module(mutant), mutant.function, mutant.first)

    def _find(self, text: str) -> Iterator[Mutant]:
        for (name, first), function in self.functions.items():
            body = ast.get_source_segment(text, function) or ""
            digest = hashlib.sha256(body.encode()).hexdigest()[:12]
            sites = itertools.chain.from_iterable(
                _sites(statement, function, "body", index)
                for index, statement in enumerate(function.body)
            )
            for place, site in enumerate(sites):
                ast.fix_missing_locations(ast.copy_location(site.new, site.node))
                before, after = ast.unparse(site.node), ast.unparse(site.new)
                line = getattr(site.node, "lineno", first)
                mutant = Mutant(
                    self.file, name, first, line, site.operator, before, after, place, digest
                )
                self._sites[mutant.key] = site
                yield mutant


def function_code(module: CodeType, name: str, first: int) -> CodeType:
    """The code object of a function in a compiled module, by its qualified name and first line."""
    for constant in module.co_consts:
        if isinstance(constant, CodeType):
            if (constant.co_qualname, constant.co_firstlineno) == (name, first):
                return constant
            if constant.co_qualname.split(".")[0] == name.split(".")[0]:
                try:
                    return function_code(constant, name, first)
                except LookupError:
                    continue
    raise LookupError(f"no function {name!r} at line {first}")


_Function = ast.FunctionDef | ast.AsyncFunctionDef


def _functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[tuple[str, int], _Function]]:
    """Functions of a module and methods of its classes: outermost ones alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, _Function):
            first = min([child.lineno, *(d.lineno for d in child.decorator_list)])
            yield (prefix + child.name, first), child
        elif isinstance(child, (ast.If, ast.Try)):
            yield from _functions(child, prefix)


def _sites(node: ast.AST, holder: ast.AST, field: str, index: int | None = None) -> Iterator[_Site]:
    """All changes at `node` and below it."""
    if isinstance(node, (ast.Assert, ast.JoinedStr)) or _is_text(node):
        return
    if isinstance(node, ast.keyword) and node.arg in SKIPPED_KEYWORDS:
        return
    for operator, new in _changes(node):
        yield _Site(operator, node, new, holder, field, index)
    if isinstance(node, (ast.If, ast.IfExp, ast.While)) and not isinstance(
        node.test, (ast.Compare, ast.BoolOp, ast.UnaryOp, ast.Constant)
    ):
        yield _Site("boolean", node.test, _negated(node.test), node, "test", None)
    for name, value in ast.iter_fields(node):
        if name in SKIPPED and not (name == "args" and isinstance(node, ast.Call)):
            continue
        if isinstance(value, ast.AST):
            yield from _sites(value, node, name)
        elif isinstance(value, list):
            for place, item in enumerate(value):
                if isinstance(item, ast.AST):
                    yield from _sites(item, node, name, place)


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What `node` itself can be changed into."""
    match node:
        case ast.BinOp(left=left, op=ast.MatMult() as op, right=right):
            if ast.dump(left) != ast.dump(right):
                yield "arithmetic", ast.BinOp(right, op, left)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            if not (_is_text(left) or _is_text(right)):
                yield "arithmetic", ast.BinOp(left, ARITHMETIC[type(op)](), right)
        case ast.AugAssign(target=target, op=op, value=value):
            if type(op) in ARITHMETIC:
                yield "arithmetic", ast.AugAssign(target, ARITHMETIC[type(op)](), value)
            yield "deletion", ast.Pass()
        case ast.Compare(left=left, ops=ops, comparators=others):
            for place, op in enumerate(ops):
                for table in (BOUNDARY, OPPOSITE):
                    if type(op) in table:
                        changed = [*ops[:place], table[type(op)](), *ops[place + 1 :]]
                        yield "comparison", ast.Compare(left, changed, others)
        case ast.BoolOp(op=op, values=values):
            yield "boolean", ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            yield "sign", operand
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield "boolean", operand
        case ast.Constant(value=bool(value)):
            yield "boolean", ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield "constant", ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            yield "constant", ast.Constant(2.0 * value if value else 1.0)
        case ast.Attribute(value=value, attr="T" | "mT", ctx=ast.Load()):
            yield "axis", value
        case ast.Call():
            yield from _call_changes(node)
        case ast.Expr(value=ast.Call()) if "super()" not in ast.unparse(node):
            yield "deletion", ast.Pass()
        case ast.Raise():
            yield "deletion", ast.Pass()


def _call_changes(call: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    function, arguments = call.func, call.args
    name = getattr(function, "attr", getattr(function, "id", ""))
    if isinstance(function, ast.Attribute):
        if name in ("detach", "clone") and not arguments and not call.keywords:
            yield "graph", function.value
        if name in REDUCTION:
            renamed = ast.Attribute(function.value, REDUCTION[name], ast.Load())
            yield "reduction", ast.Call(renamed, arguments, call.keywords)
    swappable = len(arguments) >= 2 and not any(
        isinstance(a, ast.Starred) or _is_text(a) for a in arguments[:2]
    )
    if swappable and name not in UNORDERED and ast.dump(arguments[0]) != ast.dump(arguments[1]):
        swapped = [arguments[1], arguments[0], *arguments[2:]]
        yield "argument", ast.Call(function, swapped, call.keywords)


def _negated(test: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.Not(), test)


def _is_text(node: Any) -> bool:
    """A string, a docstring among them."""
    inner = node.value if isinstance(node, ast.Expr) else node
    return isinstance(inner, ast.JoinedStr) or (
        isinstance(inner, ast.Constant) and isinstance(inner.value, str)
    )
