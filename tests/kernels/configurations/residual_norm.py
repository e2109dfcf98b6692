# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/residual_norm.py."""

from fastasr.kernels import _parts, residual_norm

from .configuration import Configuration, norm_tile


def configurations(generation: int):
    inputs, outputs = ("X", "UPDATE", "CANDIDATE", "HIDDEN", "GRAD"), ("Y", "DX", "DUPDATE", "DSUM")
    parameters = ("MASK", "WEIGHT", "BIAS", "FIRST", "SECOND")
    shares = {"fp32": "fp64", "bf16": "fp32", "fp16": "fp32"}
    plain = {"CANDIDATE": None, "HIDDEN": None, "MASK": None, "ACTIVATION": 0}
    gated, masked = {"MASK": None, "ACTIVATION": 1}, {"ACTIVATION": 1}
    strides = ("C", "x_stride", "update_stride", "candidate_stride", "hidden_stride")

    def configuration(
        label: str, kernel: str, dtype: str, channels: int, constants: dict, parameter: str = "fp32"
    ):
        given = "CANDIDATE" not in constants, "MASK" not in constants
        return Configuration(
            f"residual_norm {kernel}, {label}, {dtype}",
            getattr(residual_norm, f"{kernel}_kernel"),
            dict.fromkeys((*inputs, *outputs), dtype)
            | dict.fromkeys(parameters, parameter)
            | {"PARTS": shares[dtype]},
            constants | norm_tile(kernel, channels, dtype, generation, *given),
            strides,
            ("eps",),
        )

    for kernel in ("forward", "backward"):
        for dtype in ("fp32", "bf16"):
            for channels in (128, 512, 4096):
                yield configuration(f"gated, C={channels}", kernel, dtype, channels, gated)
            yield configuration("gated, mask, C=512", kernel, dtype, 512, masked)
            yield configuration("C=512", kernel, dtype, 512, plain)
        for number, name in ((0, "identity"), (3, "tanh"), (4, "gelu")):
            yield configuration(f"{name}, C=512", kernel, "fp32", 512, {**gated, "ACTIVATION": number})
        yield configuration("gated, C=512", kernel, "fp16", 512, gated)
        yield configuration("gated, bf16 parameters, C=512", kernel, "bf16", 512, gated, "bf16")
    ones = dict.fromkeys(strides, 1)  # Triton makes integers that are 1 constants
    yield configuration("C=1, gated", "backward", "fp32", 1, {**gated, **ones})
    # layer_norm_lstm takes 16 columns
    sixteen = {"BLOCK_P": 128, "BLOCK_C": 16, "num_warps": 4}
    for constants in (*map(_parts.reduce_tile, (128, 256, 2048)), sixteen):
        block_p = "{BLOCK_P}x{BLOCK_C}".format(**constants)
        for dtype, parameter in (("fp32", "fp32"), ("fp64", "fp32"), ("fp32", "bf16")):
            name = f"residual_norm parts, {block_p}, {dtype}" + ", bf16 sums" * (parameter == "bf16")
            types = dict.fromkeys(parameters, parameter) | {"PARTS": dtype}
            yield Configuration(name, _parts.add_pair_kernel, types, constants, ("columns",))
