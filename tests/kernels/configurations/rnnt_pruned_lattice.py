# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/rnnt_pruned_lattice.py."""

from fastasr.kernels import rnnt_pruned_lattice as module

from ._lattices import lattices


def configurations():
    names = ("X", "Y", "SCORES", "SHARES", "GRAD", "DX", "DY")
    types = dict.fromkeys(names, "fp32") | {"BOUNDARY": "i64", "STARTS": "i64"}
    yield from lattices(module, "R", (5, 16), types)
