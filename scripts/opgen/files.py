# SPDX-License-Identifier: Apache-2.0
"""Loads the declarations of a checkout, and compares or replaces the files that are written from them."""

import pkgutil
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

HEADERS = "csrc/bindings/written"
BEGIN, END = "# written by `make ops`: begin", "# written by `make ops`: end"


def main(op: list[str], check: bool, root: Path) -> int:
    folder = root / "fastasr" / "ops"
    wanted = _written(root, folder)
    unknown = set(op) - {path.stem for path in wanted}
    if unknown:
        print(f"no op {', '.join(sorted(unknown))} in {folder}")
        return 2
    files = *(folder / "_written").glob("*.py"), *(root / HEADERS).glob("*.h"), folder / "__init__.py"
    present = {path: path.read_text(encoding="utf-8") for path in files}
    different = [path for path in {**wanted, **present} if wanted.get(path) != present.get(path)]
    if op and not check:
        different = [path for path in different if path.stem in op or path.stem == "__init__"]
    for path in sorted(different):
        print(
            f"{'differs' if check else 'written' if path in wanted else 'deleted'}: {path.relative_to(root)}"
        )
        if check:
            continue
        if path in wanted:
            path.parent.mkdir(exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
        else:
            path.unlink()
    if check and different:
        print("run `make ops`, which writes these files from the declarations in fastasr/ops")
    return int(check and bool(different))


def _written(root: Path, folder: Path) -> dict[Path, str]:
    """Returns the files as they should be."""
    ops = _declarations(root, folder)
    from fastasr.testing.declared import declared
    from opgen import modules, native

    texts = {f"{name}.py": modules.write(declared(op)) for name, op in ops.items()}
    texts["__init__.py"] = _names(folder, sorted(ops))
    found = modules.formatted(texts, root / "pyproject.toml")
    ours = (
        '# SPDX-License-Identifier: Apache-2.0\n"""The ops as they run. `make ops` writes these files."""\n'
    )
    return {
        folder / "__init__.py": found.pop("__init__.py"),
        folder / "_written" / "__init__.py": ours,
        **{folder / "_written" / name: text for name, text in found.items()},
        **{
            root / HEADERS / f"{name}.h": native.formatted(native.write(declared(ops[name])), root)
            for name in sorted(ops.keys() & _included(root / HEADERS))
        },
    }


def _included(headers: Path) -> set[str]:
    """Returns the names of the headers that the bindings include."""
    include = re.compile(rf'^#include "{headers.parent.name}/{headers.name}/(\w+)\.h"', re.M)
    bindings = (path for kind in ("*.cpp", "*.h") for path in headers.parent.glob(kind))
    texts = (path.read_text(encoding="utf-8") for path in bindings)
    return {name for text in texts for name in include.findall(text)}


def _declarations(root: Path, folder: Path) -> dict:
    """Returns the ops. Their packages are bare, so that this works whatever the written files hold."""
    for name, path in (
        ("fastasr", root / "fastasr"),
        ("fastasr.ops", folder),
        ("fastasr.testing", root / "fastasr" / "testing"),
    ):
        package = sys.modules[name] = ModuleType(name)
        package.__path__ = [str(path)]
    for module in pkgutil.iter_modules([str(folder)]):
        if not module.name.startswith("_"):
            import_module(f"fastasr.ops.{module.name}")
    return import_module("fastasr.ops._op").OPS


def _names(folder: Path, ops: list[str]) -> str:
    """Returns ``fastasr/ops/__init__.py`` with the imports of the public functions."""
    text = (folder / "__init__.py").read_text(encoding="utf-8")
    lines = [BEGIN]
    for name in ops:
        place = "_wrapped" if (folder / "_wrapped" / f"{name}.py").exists() else "_written"
        lines.append(f"from fastasr.ops.{place}.{name} import {name} as {name}")
    return re.sub(f"{BEGIN}.*?{END}", "\n".join((*lines, END)), text, flags=re.S)
