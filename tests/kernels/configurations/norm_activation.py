# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/norm_activation.py."""

from fastasr.kernels import norm_activation

from .configuration import Configuration, norm_tile

SILU, GELU = 1, 4


def configurations(generation: int):
    def configuration(
        kernel: str, dtype: str, channels: int, label: str = "", parameter: str = "fp32", **constants
    ):
        constants = {"CENTRED": True, "LIMITED": False, "ACTIVATION": SILU} | constants
        return Configuration(
            f"norm_activation {kernel}, {label}C={channels}, {dtype}",
            getattr(norm_activation, f"{kernel}_kernel"),
            dict.fromkeys(("X", "Y", "GRAD", "DX"), dtype)
            | dict.fromkeys(("WEIGHT", "BIAS"), parameter)
            | {"PARTS": "fp64" if dtype == "fp32" else "fp32"},
            constants | norm_tile(kernel, channels, dtype, generation),
            ("C",),
            ("eps", "limit"),
        )

    for kernel in ("forward", "backward"):
        for dtype in ("fp32", "bf16"):
            for channels in (512, 1024):
                yield configuration(kernel, dtype, channels)
            yield configuration(kernel, dtype, 1024, "rms, ", CENTRED=False, BIAS=None)
            yield configuration(kernel, dtype, 1024, "rms, limited, ", CENTRED=False, LIMITED=True, BIAS=None)
        yield configuration(kernel, "fp16", 512)
        yield configuration(kernel, "fp32", 512, "gelu, ", ACTIVATION=GELU)
        yield configuration(kernel, "bf16", 1024, "bf16 parameters, ", "bf16")
