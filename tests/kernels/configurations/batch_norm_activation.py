# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/batch_norm_activation.py."""

from fastasr.kernels import _parts, batch_norm_activation

from .configuration import Configuration

IDENTITY, SILU, GELU = 0, 1, 4
CHANNELS = 512


def configurations():
    def configuration(kernel: str, dtype: str, label: str = "", **constants):
        block_c = batch_norm_activation.block_channels(CHANNELS)
        block_r = batch_norm_activation.ELEMENTS // block_c
        own = {"BLOCK_R": block_r, "BLOCK_C": block_c, "BLOCK_P": batch_norm_activation.PARTS}
        own |= {"ACTIVATION": SILU, "num_warps": _parts.WARPS} | constants
        return Configuration(
            f"batch_norm_activation {kernel}, {label}C={CHANNELS}, {dtype}",
            getattr(batch_norm_activation, f"{kernel}_kernel"),
            dict.fromkeys(("X", "Y", "GRAD", "DX"), dtype)
            | dict.fromkeys(("MEAN", "VARIANCE", "RATE", "STATISTICS"), "fp32")
            | dict.fromkeys(("WEIGHT", "BIAS", "DWEIGHT", "DBIAS"), "fp32")
            | {"TABLE": "fp64" if dtype == "fp32" else "fp32", "HIDDEN": "u8"},
            own,
            ("C",),
            ("eps", "momentum"),
        )

    for kernel in ("statistics", "normalise", "sums", "backward"):
        for dtype in ("fp32", "bf16"):
            yield configuration(kernel, dtype)
            yield configuration(kernel, dtype, "no mask, ", HIDDEN=None)
        if kernel == "statistics":
            continue
        yield configuration(kernel, "fp16", "no mask, ", HIDDEN=None)
        yield configuration(kernel, "bf16", "identity, ", ACTIVATION=IDENTITY)
        yield configuration(kernel, "fp32", "gelu, no mask, ", HIDDEN=None, ACTIVATION=GELU)
