# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/tdt_lattice.py."""

from fastasr.kernels import tdt_lattice as module

from .configuration import Configuration


def configurations():
    names = ("X", "Y", "Z", "SCORES", "SHARES", "CELLS", "SUMS", "GRAD", "DX", "DY", "DZ", "MASS")
    types = dict.fromkeys(names, "fp32") | dict.fromkeys(("BOUNDARY", "DURATIONS"), "i64")
    for symbols in (40, 100, 600):
        for kernel in ("forward", "backward"):
            function = getattr(module, f"{kernel}_kernel")
            name = f"tdt_lattice {kernel}, S={symbols}"
            yield Configuration(name, function, types, {"COUNT": 5, **module.tile(symbols)})
    yield Configuration("tdt_lattice shares", module.shares_kernel, types, {"COUNT": 5, **module.SHARES})
    constants = {"BOUNDARY": None, "SUMS": None, "COUNT": 5, **module.tile(600)}
    yield Configuration("tdt_lattice forward, no shares, S=600", module.forward_kernel, types, constants)
