# SPDX-License-Identifier: Apache-2.0
"""The API reference of the site: mkdocs calls ``on_files``, mkdocstrings writes the pages from the docstrings."""

import ast
import logging
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# It warns where __all__ is computed and where one line of a docstring describes two arguments.
logging.getLogger("mkdocs.plugins.griffe").setLevel(logging.ERROR)


def public_names(package: Path) -> list[str]:
    """Returns the imports that ``__all__`` of ``package/__init__.py`` names, or the public modules where it is
    computed. Another name has its page where it is defined.
    """
    body = ast.parse((package / "__init__.py").read_text(encoding="utf-8")).body
    imports = [
        statement for statement in ast.walk(ast.Module(body, [])) if isinstance(statement, ast.ImportFrom)
    ]
    imported = {alias.asname or alias.name for statement in imports for alias in statement.names}
    for statement in body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == "__all__":
            items = getattr(statement.value, "elts", [None])
            if all(isinstance(item, ast.Constant) for item in items):
                return [item.value for item in items if item.value in imported]
            return sorted(file.stem for file in package.glob("[!_]*.py"))
    return []


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page ``api/<package>.md`` for every package of fastasr that defines ``__all__``."""
    for init in sorted((ROOT / "fastasr").rglob("__init__.py")):
        package = ".".join(init.parent.relative_to(ROOT).parts)
        if names := public_names(init.parent):
            parts = [
                f"# {package}",
                f"::: {package}\n    options: {{show_root_heading: false, members: false}}",
            ]
            parts += [f"::: {package}.{name}" for name in names if not (init.parent / name).is_dir()]
            files.append(File.generated(config, f"api/{package}.md", content="\n\n".join(parts)))
    return files
