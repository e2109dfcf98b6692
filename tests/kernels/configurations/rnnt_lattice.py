# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/rnnt_lattice.py."""

from fastasr.kernels import rnnt_lattice as module

from ._lattices import lattices
from .configuration import Configuration


def configurations():
    names = ("X", "Y", "SCORES", "SHARES", "COLUMN", "GRAD", "DX", "DY")
    types = dict.fromkeys(names, "fp32") | {"BOUNDARY": "i64"}
    yield from lattices(module, "T", (40, 750), types, ("share_row",))  # T=2000 has the lanes of 750
    constants = {"MODIFIED": False, "BOUNDARY": None, "SHARES": None, **module.tile(750)}
    name = "rnnt_lattice forward, no shares, T=750"
    yield Configuration(name, module.forward_kernel, types, constants)
