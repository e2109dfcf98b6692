# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/tdt_lattice.py."""

from fastasr.kernels import tdt_lattice as module

from .configuration import Configuration


def configurations():
    names = ("X", "Y", "Z", "SCORES", "SHARES", "CELLS_M", "CELLS_E", "GRAD", "DX", "DY", "DZ", "MASS")
    types = dict.fromkeys(names, "fp32") | dict.fromkeys(("BOUNDARY", "DURATIONS"), "i64")
    for symbols in (40, 600):
        lanes, warps = module._lanes(symbols)
        for kernel in ("forward", "backward"):
            function = getattr(module, f"{kernel}_kernel")
            name = f"tdt_lattice {kernel}, S={symbols}"
            yield Configuration(name, function, types, {"BLOCK": lanes, "num_warps": warps})
    constants = {"BLOCK": lanes, "BOUNDARY": None, "SHARES": None, "num_warps": warps}
    yield Configuration("tdt_lattice forward, no shares, S=600", module.forward_kernel, types, constants)
