# SPDX-License-Identifier: Apache-2.0
"""Registers ``torch.ops.fastasr`` in every process that imports both fastasr and torch, in either order.

``torch.export.load`` looks the ops of a saved program up. The command line imports fastasr without torch, whose import
takes seconds, so the import of fastasr may not import torch.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_with_torch() -> None:
    """Registers the ops now if torch is imported, and at the end of its import if not."""
    if "torch" in sys.modules:
        import_module("fastasr.ops")
    else:
        sys.meta_path.insert(0, _BesideTorch())


class _BesideTorch:
    """A finder of modules that registers the ops at the end of the import of torch."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torch":
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:  # None: no torch, or a folder without code
            loader, execute = spec.loader, spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                del vars(loader)["exec_module"]
                execute(module)
                sys.meta_path.remove(self)
                import_module("fastasr.ops")

            vars(loader)["exec_module"] = execute_and_register
        return spec
