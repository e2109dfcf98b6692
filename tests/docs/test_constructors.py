# SPDX-License-Identifier: Apache-2.0
"""No tensor is made with torch's default dtype or on its default device: a table, a cache or a constant would be wrong
under ``torch.set_default_dtype`` or ``torch.set_default_device``. A module's constructor asks for both defaults.
"""

import ast
from functools import cache

import sources
from torch.utils._device import _device_constructors

MAKERS = {f.__name__ for f in _device_constructors()} | {"Tensor", "FloatTensor"}
INFERRED = {"as_tensor", "asarray"}  # take the dtype of what they are given
DRAWS = {"rand"}  # a swap draws what upstream draws, which is in the default dtype
UPSTREAM_DRAWS = {  # and on the default device
    "through_blocks in fastasr/models/fast_conformer/block.py",
    "encoded in fastasr/swap/forwards/nemo_row.py",
    "EBranchformerEncoder.forward in fastasr/models/e_branchformer/encoder.py",
}
DATA = "fastasr.testing", "fastasr.benchmarks"  # make the data of tests and of benchmarks


@cache
def product():
    """Returns file -> its tree."""
    found = {name: path for name, path in sources.modules().items() if not name.startswith(DATA)}
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in found.values()}


def nodes(kind):
    """Yields (file, node) for every node of a kind."""
    for path, tree in product().items():
        yield from ((path, node) for node in ast.walk(tree) if isinstance(node, kind))


@cache
def names_of_modules():
    """Returns the names of the classes that are torch.nn.Modules."""
    bases = {
        node.name: {ast.unparse(base).split(".")[-1] for base in node.bases}
        for _, node in nodes(ast.ClassDef)
    }
    found = {"Module"}
    while more := {name for name, those in bases.items() if those & found} - found:
        found |= more
    return found


def maker(call):
    """Returns the name of the maker that a call calls, or None."""
    parts = ast.unparse(call.func).split(".")
    return parts[1] if parts[0] == "torch" and len(parts) == 2 and parts[1] in MAKERS else None


def left_out(call):
    """Says which of dtype and device a call leaves to torch's defaults."""
    name, given = maker(call), {keyword.arg for keyword in call.keywords}
    if None in given and name not in ("Tensor", "FloatTensor"):  # **like has both
        return []
    inferred = {"dtype"} if name in INFERRED | DRAWS else set()
    return [option for option in ("dtype", "device") if option not in given | inferred]


def faults(path, node, scope=()):
    for child in ast.iter_child_nodes(node):
        inner = scope
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            inner = (*scope, child.name)
        in_module = len(inner) > 1 and inner[-1] == "__init__" and inner[-2] in names_of_modules()
        place = f"{'.'.join(inner)} in {path.relative_to(sources.ROOT)}"
        looked_at = isinstance(child, ast.Call) and maker(child)
        if looked_at and not in_module and place not in UPSTREAM_DRAWS and (options := left_out(child)):
            yield f"{place}, line {child.lineno}: {ast.unparse(child)} without {' and '.join(options)}"
        yield from faults(path, child, inner)


def test_every_tensor_has_a_dtype_and_a_device():
    found = [fault for path, tree in product().items() for fault in faults(path, tree)]
    assert not found, "\n".join(found)


def test_no_maker_is_imported_by_its_name():
    found = [
        f"{path}: {alias.name}"
        for path, node in nodes(ast.ImportFrom)
        if node.module == "torch"
        for alias in node.names
        if alias.name in MAKERS - {"Tensor"}
    ]
    calls = [
        f"{path}, line {node.lineno}: {ast.unparse(node)}"
        for path, node in nodes(ast.Call)
        if ast.unparse(node.func) == "Tensor"
    ]
    assert not found + calls, "\n".join(found + calls)


def is_number(node):
    if isinstance(node, ast.UnaryOp):
        return is_number(node.operand)
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in ("float", "int")
    return isinstance(node, ast.Constant) or ast.unparse(node) in ("INF", "math.inf", "torch.inf")


def test_no_tensor_of_two_numbers():
    """``torch.where`` gives two numbers the default dtype."""
    found = [
        f"{path}, line {node.lineno}: {ast.unparse(node)}"
        for path, node in nodes(ast.Call)
        if len(node.args) == 3
        and ast.unparse(node.func) == "torch.where"
        and all(map(is_number, node.args[1:]))
    ]
    assert not found, "\n".join(found)
