# SPDX-License-Identifier: Apache-2.0
"""What holds of the code in pages without running it; tests/packaging/test_pages.py runs it."""

import ast
import inspect
import re

import pytest
from page_blocks import FRAMEWORKS, OPS, PAGES, ROOT, blocks

from fastasr import ops

COMMAND = re.compile(r"^\s*(\$ )?(pip|python3?|make|fastasr|cd|bash|apt-get) ", re.MULTILINE)


@pytest.mark.parametrize(
    "page", [*PAGES, *FRAMEWORKS, *OPS], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_code_says_its_language(page):
    """A block without one is no command that the test of pages would have to run."""
    for block in blocks(page):
        assert block.language in ("", "python", "bash", "text"), f"{page}:{block.line}"
        assert block.language or not COMMAND.search(block.code), (
            f"{page}:{block.line}: a command without `bash`"
        )


def test_first_examples_need_nothing():
    """The README's example, its installation of the wheel, and the pages of ops run on every machine."""
    readme = [b for b in blocks(PAGES[0]) if b.language in ("python", "bash")]
    assert [b.language for b in readme if not b.needs] == ["bash", "python"]
    assert not [b for page in OPS for b in blocks(page) if b.needs]


def shown(code: str) -> list:
    """Returns functions with the signatures in a block of an op's page: ``fastasr.ops.bypass(x_orig, x, scale)``."""
    calls = re.findall(r"fastasr\.ops\.(\w+)\(((?:[^()]|\([^()]*\))*)\)", re.sub(r"#.*", "", code))
    found = []
    for name, arguments in calls:
        names = {}
        exec(compile(ast.parse(f"def {name}({arguments}): pass"), "<page>", "exec"), {}, names)
        found.append(names[name])
    return found


@pytest.mark.parametrize("page", OPS, ids=lambda page: page.stem)
def test_the_page_of_an_op_shows_its_signature(page):
    """Arguments have the op's names, order and kinds, and the defaults that are shown are the op's. A page may leave
    out arguments that have a default.
    """
    first = blocks(page)[0]
    assert first.language == ""
    functions = shown(first.code)
    assert functions, first.code
    for function in functions:
        own = inspect.signature(getattr(ops, function.__name__)).parameters
        parameters = inspect.signature(function).parameters.values()
        names = [p.name for p in parameters]
        assert names == [name for name in own if name in names], function.__name__
        for p in parameters:
            assert p.kind == own[p.name].kind, f"{function.__name__}: {p.name}"
            assert p.default in (p.empty, own[p.name].default), f"{function.__name__}: {p.name}"
        assert all(p.default is not p.empty for name, p in own.items() if name not in names)
