# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/batch_norm_activation.py."""

from fastasr.kernels import _parts, batch_norm_activation

from .configuration import Configuration

IDENTITY, SILU, GELU = 0, 1, 4


def configurations():
    def configuration(kernel: str, dtype: str, channels: int, label: str = "", given: str = "", **constants):
        block_c = batch_norm_activation.block_channels(channels)
        block_r = batch_norm_activation.ELEMENTS // block_c
        own = {"BLOCK_R": block_r, "BLOCK_C": block_c} | constants
        if kernel != "statistics":
            own = {"ACTIVATION": SILU} | own
        if kernel in ("normalise", "backward"):
            own["BLOCK_P"] = batch_norm_activation.PARTS
        parameters = ("WEIGHT", "BIAS", "DWEIGHT", "DBIAS")
        return Configuration(
            f"batch_norm_activation {kernel}, {label}C={channels}, {dtype}",
            getattr(batch_norm_activation, f"{kernel}_kernel"),
            dict.fromkeys(("X", "Y", "GRAD", "DX"), dtype)
            | dict.fromkeys(("MEAN", "VARIANCE", "RATE", "STATISTICS"), "fp32")
            | dict.fromkeys(parameters, given or "fp32")
            | {"TABLE": "fp64" if dtype == "fp32" else "fp32", "HIDDEN": "u8"},
            own,
            _parts.WARPS,
            ("C",) if channels % 16 == 0 else (),
            ("eps", "momentum"),
        )

    for kernel in ("statistics", "normalise", "sums", "backward"):
        for dtype in ("fp32", "bf16"):
            yield configuration(kernel, dtype, 512)
            yield configuration(kernel, dtype, 512, "no mask, ", HIDDEN=None)
        if kernel == "statistics":
            continue
        yield configuration(kernel, "fp16", 512, "no mask, ", HIDDEN=None)
        yield configuration(kernel, "bf16", 512, "identity, ", ACTIVATION=IDENTITY)
        yield configuration(kernel, "fp32", 512, "gelu, no mask, ", HIDDEN=None, ACTIVATION=GELU)
