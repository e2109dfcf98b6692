# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/gated_depthwise_conv.py."""

from fastasr.kernels import _folded_norm, _recordings
from fastasr.kernels import _sliding_taps as sliding
from fastasr.kernels import gated_depthwise_conv as conv

from ._depthwise import taps_gradients
from .configuration import Configuration


def configurations():
    inputs = ("H", "CACHE", "WEIGHT", "CAUSAL_WEIGHT", "CHUNK_SCALE", "BIAS", "CAUSAL_BIAS", "GRAD")
    between = ("U", "Q", "R", "V", "G", "X")
    outputs = ("Y", "DH", "DCACHE", "DWEIGHT", "DBIAS", "DCAUSAL_WEIGHT", "DCAUSAL_BIAS", "DCHUNK_SCALE")
    chunk_causal = ("CACHE", "CAUSAL_WEIGHT", "CHUNK_SCALE", "CAUSAL_BIAS", "DCACHE", "DCAUSAL_WEIGHT")
    absent = dict.fromkeys((*chunk_causal, "DCAUSAL_BIAS", "GROUPS"))
    strides = (f"{of}{by}_stride" for of in ("", "grad_", "y_", "q_", "dh_") for by in ("time", "batch"))
    divisible = ("C", *strides)
    block_c = {"BLOCK_C": conv.BLOCK_C, "num_warps": conv.NUM_WARPS}
    for dtype in ("fp32", "bf16"):
        types = dict.fromkeys((*inputs, *between, *outputs), dtype)
        types |= {"MASK": "u8", "TABLE": "fp32", "PARTS": "fp32", "GROUPS": "i32"}
        for form in ("plain", "chunks", "recordings", "recordings in chunks"):
            chunked, recordings = "chunks" in form, "recordings" in form
            none = {} if chunked else dict(absent)
            if recordings:
                none |= {"CACHE": None, "DCACHE": None}
                none.pop("GROUPS", None)
            else:
                none["GROUPS"] = None
            outer = block_c | none | conv.convolving(31, 32 if chunked else 1500, chunked)
            only_q = {} if chunked else dict.fromkeys(("R", "V"))
            for kernel, constants in (
                ("gate", block_c | none | {"GATE": 0, "BLOCK_T": conv.BLOCK_T, "BLOCK_K": conv.BLOCK_K}),
                ("forward", outer | {"ACTIVATION": 1}),
                ("output_gradient", outer | only_q | {"ACTIVATION": 1}),
                ("input_gradient", outer | {"GATE": 0, "TILED": True}),
                ("add_taps", block_c | none | {"BLOCK_P": sliding.MAX_PARTS}),
            ):
                if recordings and kernel in ("gate", "add_taps"):
                    continue  # the same as without recordings
                name = f"gated_depthwise_conv {kernel.replace('_', ' ')}, {form}, {dtype}"
                function = getattr(sliding if kernel == "add_taps" else conv, f"{kernel}_kernel")
                yield Configuration(name, function, types, constants, divisible)
            name = f"gated_depthwise_conv weight gradient, {form}, {dtype}"
            strides, tiles = ("C", "g_batch", "g_time", "x_batch", "x_time"), (conv.BLOCK_C, conv.BLOCK_C)
            yield taps_gradients(
                name, types, 31, sliding.LINE, strides, tiles, chunked=chunked, recordings=recordings
            )
            if chunked:
                name = f"gated_depthwise_conv edge gradient, {form}, {dtype}"
                constants = block_c | none | {"BLOCK_R": conv.BLOCK_R, "num_warps": conv.EDGE_WARPS}
                yield Configuration(name, conv.edge_gradient_kernel, types, constants, divisible)
        name = f"gated_depthwise_conv weight gradient, no activation, {dtype}"
        yield taps_gradients(name, types, 31, sliding.LINE, strides, (0, conv.BLOCK_C))
        rows = block_c | absent | conv.convolving(31, 1500, False) | {"GATE": 0, "TILED": False}
        name = f"gated_depthwise_conv input gradient, no activation, {dtype}"
        yield Configuration(name, conv.input_gradient_kernel, types, rows, divisible)
        silu = block_c | absent | conv.convolving(31, 1500, False) | {"ACTIVATION": 2}
        gate = block_c | absent | {"GATE": 1, "BLOCK_T": conv.BLOCK_T, "BLOCK_K": conv.BLOCK_K}
        for kernel, constants in (
            ("forward", silu),
            ("output_gradient", silu | {"R": None, "V": None}),
            ("gate", gate),
            ("input_gradient", silu | {"GATE": 1, "TILED": True}),
        ):
            name = f"gated_depthwise_conv {kernel.replace('_', ' ')}, SiLU, {dtype}"
            function = getattr(conv, f"{kernel}_kernel")
            yield Configuration(name, function, types, constants, divisible)
    mixed = types | {"WEIGHT": "fp32", "BIAS": "fp32"}  # under autocast, and with a norm in the taps
    plain = block_c | absent | conv.convolving(31, 1500, False)
    for kernel, constants in (
        ("forward", plain | {"ACTIVATION": 1}),
        ("output_gradient", plain | {"R": None, "V": None, "ACTIVATION": 1}),
        ("input_gradient", plain | {"GATE": 0, "TILED": True}),
    ):
        name = f"gated_depthwise_conv {kernel.replace('_', ' ')}, bf16, parameters fp32"
        yield Configuration(name, getattr(conv, f"{kernel}_kernel"), mixed, constants, divisible)
    types, table = {"STARTS": "i64", "OUT": "i32"}, _recordings.TABLE
    yield Configuration("gated_depthwise_conv groups", _recordings.groups_kernel, types, table)
    types = dict.fromkeys(("W", "B", "MEAN", "VARIANCE", "NORM_W", "NORM_B", "OUT_W", "OUT_B"), "fp32")
    name = "gated_depthwise_conv folded norm"
    yield Configuration(name, _folded_norm.folded_kernel, types, _folded_norm.TILE, ("channels",), ("eps",))
