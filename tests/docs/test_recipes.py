# SPDX-License-Identifier: Apache-2.0
"""What each op's page says about shapes of one's own: its Python runs, its commands name sizes that the op has."""

import re

import pytest
import recipes
import tables
from typer.testing import CliRunner

from fastasr import ops
from fastasr.benchmarks import runner
from fastasr.cli import console
from fastasr.cli.app import app


@pytest.mark.parametrize("name", ops.NAMES)
def test_the_recipe_of_an_op_runs(name, capsys):
    text = tables.op_page(name).read_text(encoding="utf-8")
    recipe = recipes.recipe(name)
    assert recipe in text
    exec(re.search(r"```python\n(.*?)```", recipe, re.DOTALL)[1], {})
    assert f"{name}: float32 on cpu" in capsys.readouterr().out
    commands = re.findall(r"^- `fastasr (.*)`$", recipe, re.MULTILINE)
    assert [command.split()[:2] for command in commands] == [["check", name], ["bench", name]]
    sizes = re.search(r"--shape (\S+)", commands[1])[1]
    options = runner.Options(names=(name,), sizes=console.sizes(sizes))
    assert [case.name for case in options.cases(name)] == [sizes]


def test_the_command_that_checks_an_op_runs():
    command = re.search(r"^- `fastasr (check .*)`$", recipes.recipe("bypass"), re.MULTILINE)[1]
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("bypass: bfloat16 on cpu")
