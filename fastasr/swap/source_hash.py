# SPDX-License-Identifier: Apache-2.0
"""Computes a fingerprint of the code that a module runs. Copies of the same code have the same fingerprint, edited
copies a different one.

The fingerprint of some functions is the SHA-256 of their normalised syntax trees and of everything beside them that
they reach: functions and classes named in their bodies, and methods called on ``self``. "Beside" means in a source file
of the same folder: recipe folders import ``scaling`` from ``zipformer`` in that way, while torch, k2 and the standard
library stay names.

Normalisation drops docstrings, annotations and the wording of assertions, exception messages and f-strings, and spells
``nn`` as ``torch.nn``. A syntax tree has no formatting and no comments. Field order and line numbers do not enter, so
the value does not depend on the Python version.
"""

import ast
import functools
import hashlib
import inspect
import os
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

_ALIASES = {id(torch.nn): ("torch", "nn"), id(torch.nn.functional): ("torch", "nn", "functional")}


class SourceUnavailable(Exception):
    """Raised if the source of a function cannot be read, so that it cannot be recognised."""


def unwrap(function: Any) -> Any:
    """Returns the plain Python function behind bound methods, ``functools.wraps`` and ``torch.compile`` wrappers."""
    while True:
        inner = (
            getattr(function, "_torchdynamo_orig_callable", None)
            or getattr(function, "__wrapped__", None)
            or getattr(function, "__func__", None)
        )
        if inner is None:
            return function
        function = inner


def fingerprint(functions: Sequence[Callable], owner: type | None = None) -> str:
    """Returns the first 24 hex digits of the SHA-256 of ``functions`` and of the code beside them that they reach.

    ``owner`` is the class on which ``self.<method>`` is looked up. Raises SourceUnavailable if a source is missing, as
    for code typed at a prompt or compiled by TorchScript.
    """
    return _fingerprint(tuple(unwrap(f) for f in functions), owner)


@functools.lru_cache(maxsize=4096)
def _fingerprint(functions: tuple[Callable, ...], owner: type | None) -> str:
    texts, pending, seen = {}, list(functions), set()
    while pending:
        obj = pending.pop()
        if id(obj) in seen:
            continue
        seen.add(id(obj))
        tree = _normalised_tree(obj)
        texts[f"{obj.__qualname__}"] = _spell(tree)
        pending.extend(_reached(obj, tree, owner))
    digest = hashlib.sha256()
    for name in sorted(texts):
        digest.update(f"{name}\n{texts[name]}\n".encode())
    return digest.hexdigest()[:24]


def normal_form(source: str) -> str:
    """Returns the normalised syntax tree of a module's source as text."""
    return _spell(_Normaliser({}).visit(ast.parse(source)))


def _source_file(obj: Any) -> str | None:
    try:
        return inspect.getsourcefile(obj)
    except TypeError:
        return None


def _normalised_tree(obj: Any) -> ast.AST:
    try:
        source = inspect.getsource(obj)
    except (OSError, TypeError) as error:
        raise SourceUnavailable(f"no source for {getattr(obj, '__qualname__', obj)}: {error}") from None
    return _Normaliser(_globals_of(obj)).visit(_parse(source))


def _parse(source: str) -> ast.AST:
    """Parses the one definition in ``source``, which may be indented."""
    try:
        return ast.parse(textwrap.dedent(source)).body[0]
    except IndentationError:  # a docstring or comment starts further left than its function
        block: Any = ast.parse(f"if True:\n{source}").body[0]
        return block.body[0]


def _globals_of(obj: Any) -> dict[str, Any]:
    if isinstance(obj, types.FunctionType):
        return obj.__globals__
    module = inspect.getmodule(obj)
    return vars(module) if module is not None else {}


def _reached(obj: Any, tree: ast.AST, owner: type | None) -> Iterator[Any]:
    """Returns the functions and classes beside ``obj`` that its body names, and methods that it calls on ``self``."""
    folder = os.path.dirname(_source_file(obj) or "")
    namespace = _globals_of(obj)
    for node in ast.walk(tree):
        found = None
        if isinstance(node, ast.Name):
            found = namespace.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            found = inspect.getattr_static(owner, node.attr, None) if owner is not None else None
        if isinstance(found, (staticmethod, classmethod)):
            found = found.__func__
        if not isinstance(found, (types.FunctionType, type)):
            continue
        found = unwrap(found)
        if "<locals>" in found.__qualname__:  # A decorator made it; only its name identifies it.
            continue
        file = _source_file(found)
        if file is not None and os.path.dirname(file) == folder:
            yield found


class _Normaliser(ast.NodeTransformer):
    def __init__(self, namespace: dict[str, Any]) -> None:
        self.namespace = namespace

    def _function(self, node: Any) -> ast.AST:
        self.generic_visit(node)
        node.returns = None
        arguments = node.args
        for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
            argument.annotation = None
        for collected in (arguments.vararg, arguments.kwarg):
            if collected is not None:
                collected.annotation = None
        return _without_docstring(node)

    visit_FunctionDef = _function
    visit_AsyncFunctionDef = _function

    def _body(self, node: ast.Module | ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        return _without_docstring(node)

    visit_Module = _body
    visit_ClassDef = _body

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        self.generic_visit(node)
        return None if node.value is None else ast.Assign(targets=[node.target], value=node.value)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        self.generic_visit(node)
        node.msg = None
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.exc, ast.Call):
            node.exc = node.exc.func
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return ast.Constant("f-string")

    def visit_Name(self, node: ast.Name) -> ast.AST:
        parts = _ALIASES.get(id(self.namespace.get(node.id)))
        if parts is None:
            return node
        spelled: ast.expr = ast.Name(parts[0])
        for part in parts[1:]:
            spelled = ast.Attribute(spelled, part)
        return spelled


def _without_docstring(node: Any) -> Any:
    match node.body:
        case [ast.Expr(value=ast.Constant(value=str())), *rest]:
            node.body = rest or [ast.Pass()]
    return node


_SILENT = {"ctx", "type_comment", "kind", "type_params", "type_ignores"}


def _spell(node: Any) -> str:
    """Returns a syntax tree as text that does not depend on the Python version."""
    if isinstance(node, ast.AST):
        fields = [
            f"{name}={_spell(value)}"
            for name, value in ast.iter_fields(node)
            if name not in _SILENT and value is not None and value != []
        ]
        return f"{type(node).__name__}({','.join(sorted(fields))})"
    if isinstance(node, list):
        return f"[{','.join(_spell(item) for item in node)}]"
    return repr(node)
