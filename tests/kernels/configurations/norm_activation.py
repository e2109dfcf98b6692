# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/norm_activation.py."""

from fastasr.kernels import _layer_norm, norm_activation

from .configuration import DTYPES, Configuration

SILU, GELU = 1, 4


def configurations(generation: int):
    def configuration(
        kernel: str, dtype: str, channels: int, label: str = "", parameter: str = "fp32", **constants
    ):
        constants = {"CENTRED": True, "LIMITED": False, "ACTIVATION": SILU} | constants
        block_c = _layer_norm.row_width(channels)
        if kernel == "forward":
            block_r, _, warps = _layer_norm.row_blocks(channels, _layer_norm.forward_elements(generation))
        else:
            elements, warps, _ = _layer_norm.backward_tile(channels, DTYPES[dtype], False, False, generation)
            block_r = max(1, elements // block_c)
        return Configuration(
            f"norm_activation {kernel}, {label}C={channels}, {dtype}",
            getattr(norm_activation, f"{kernel}_kernel"),
            dict.fromkeys(("X", "Y", "GRAD", "DX"), dtype)
            | dict.fromkeys(("WEIGHT", "BIAS"), parameter)
            | {"PARTS": "fp64" if dtype == "fp32" else "fp32"},
            constants | {"BLOCK_R": block_r, "BLOCK_C": block_c},
            warps,
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
