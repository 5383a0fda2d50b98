"""A relative error on what a function returns, put into its code.

Every `return x` of the function becomes `return on(x)`, so that all who hold the function see it.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
from collections.abc import Callable, Sequence
from types import CodeType, FunctionType
from typing import Any, NamedTuple, final

import numpy as np
from torch import Tensor

from verification.mutation.mutants import Source, function_code

HOOK = "_apo_error_of_the_returned_value"

Change = Callable[[Any], Any]


class Quantity(NamedTuple):
    """A number or an array that the engine or the reference computes.

    Attributes:
        name: what it is.
        target: "module:function" or "module:Class.method" that returns it.
        path: where in the returned value: places and names, outermost first; () is all of it.
        of: "value", or "derivative": what goes backward through the value, and not the value.
    """

    name: str
    target: str
    path: tuple[int | str, ...] = ()
    of: str = "value"


@final
class Error:
    """What the returned value is changed by; it may be exchanged while the code is in place."""

    def __init__(self, quantity: Quantity) -> None:
        self._quantity = quantity
        self.change: Change = unchanged

    def on(self, value: Any) -> Any:
        """The returned value with the error."""
        return changed(value, self._quantity.path, self._leaf)

    def _leaf(self, value: Any) -> Any:
        if self._quantity.of == "value":
            return self.change(value)
        if not (isinstance(value, Tensor) and value.requires_grad):
            return value
        watched = value.clone()
        watched.register_hook(lambda grad: self.change(grad))
        return watched


def unchanged(value: Any) -> Any:
    """A copy: what a test says to this, it says to no error."""
    return scaled_by(0.0)(value)


def scaled_by(epsilon: float) -> Change:
    """Times 1 + epsilon."""
    return lambda value: value * (1.0 + epsilon)


def through_float32(value: Any) -> Any:
    """Rounded to float32, in the dtype it had."""
    if isinstance(value, Tensor):
        return value.float().to(value.dtype)
    array = np.asarray(value)
    single = np.complex64 if np.iscomplexobj(array) else np.float32
    rounded = array.astype(single).astype(array.dtype)
    return rounded if isinstance(value, np.ndarray) else rounded[()]


def changed(value: Any, path: Sequence[int | str], change: Change) -> Any:
    """`value` with `change` on the numbers at `path`; integers and what is no number stay."""
    if path:
        head, rest = path[0], path[1:]
        if isinstance(value, dict):
            return {**value, head: changed(value[head], rest, change)}
        if isinstance(head, str):
            new = changed(getattr(value, head), rest, change)
            named = hasattr(value, "_replace")
            return value._replace(**{head: new}) if named else _with(value, head, new)
        items = [changed(v, rest, change) if i == head else v for i, v in enumerate(value)]
        return type(value)(items)
    if isinstance(value, dict):
        return {key: changed(item, (), change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [changed(item, (), change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, (np.ndarray, np.generic)):
        return change(value) if value.dtype.kind in "fc" else value
    return change(value) if isinstance(value, (float, complex)) else value


def _with(value: Any, name: str, new: Any) -> Any:
    """A dataclass, or another object, with one attribute changed."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{name: new})
    other = copy.copy(value)
    setattr(other, name, new)
    return other


def find(quantity: Quantity, sources: Sequence[Source]) -> tuple[Source, str, int]:
    """The source, the qualified name and the first line of the quantity's function.

    Raises:
        LookupError: there is none.
    """
    module, name = quantity.target.split(":")
    for source in sources:
        if source.file.removesuffix(".py").replace("/", ".").removesuffix(".__init__") != module:
            continue
        for function, first in source.functions:
            if function == name:
                return source, function, first
    raise LookupError(f"`target` must name a function of the sources, got {quantity.target!r}.")


def code_with_hook(source: Source, name: str, first: int) -> CodeType:
    """The function's code with the hook on every value that it returns."""
    tree = copy.deepcopy(source.tree)
    function = next(
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and min([node.lineno, *(d.lineno for d in node.decorator_list)]) == first
    )
    for statement in function.body:
        _Returns().visit(statement)
    module = compile(ast.fix_missing_locations(tree), source.path, "exec")
    return function_code(module, name, first)


def put(quantity: Quantity, sources: Sequence[Source], functions: Sequence[FunctionType]) -> Error:
    """Put an `Error` into the function, in this process, for good."""
    error = Error(quantity)
    code = code_with_hook(*find(quantity, sources))
    for function in functions:
        function.__globals__[HOOK] = error.on
        function.__code__ = code
    return error


@final
class _Returns(ast.NodeTransformer):
    """Leaves functions inside alone."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return node

    def visit_Return(self, node: ast.Return) -> ast.AST:
        if node.value is not None:
            hook = ast.Name(HOOK, ast.Load())
            node.value = ast.copy_location(ast.Call(hook, [node.value], []), node.value)
        return node
