# SPDX-License-Identifier: Apache-2.0
"""The configurations of every Triton kernel that the launchers use at model shapes: kernel, constants, types, warps.

Each file of kernels has a function of its name here, with an underscore in front.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastasr.kernels._sliding_taps import LINE, Map

KERNELS = Path(__file__).parents[2] / "kernels"
# Bytes of shared memory that a program may have, by architecture.
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
ARCHITECTURES = tuple(SHARED)
# The architectures that share a table of tiles, by the one that ``generation`` of kernels/_launch.py names.
GENERATIONS = {80: (80, 86, 89), 90: (90,), 100: (100,), 120: (120,)}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRODUCTS = ("fp32", "tf32", "bf16")  # "tf32": tensors of float32 whose products may be rounded to TF32


@dataclass
class Configuration:
    """A kernel with everything that selects its code.

    ``types`` are the element types of the pointers (other arguments are i32). ``divisible`` names the integers that
    Triton knows to be multiples of 16, ``floats`` the numbers that are fp32. ``stages`` belongs to the pipeline of
    loads. ``most_registers`` is what a launcher allows each thread.
    """

    name: str
    kernel: object
    types: dict[str, str]
    constants: dict
    warps: int
    divisible: tuple[str, ...] = ()
    floats: tuple[str, ...] = ()
    stages: int = 3  # Triton's own choice
    most_registers: int | None = None  # the assembler's own choice
    architectures: tuple[int, ...] = ARCHITECTURES  # what ``configurations`` fills in


@contextmanager
def _setting(dtype: str):
    """Yields torch's dtype, while torch's setting for products of float32 is what ``dtype`` says."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield DTYPES[_element(dtype)]
    finally:
        matmul.fp32_precision = before


def _element(dtype: str) -> str:
    return "fp32" if dtype == "tf32" else dtype


def _adding(parts: int) -> tuple[dict[str, int], int]:
    """Returns (constants, warps) of a kernel that adds up so many parts."""
    from fastasr.kernels import _parts

    constants = _parts.adding(parts)
    return constants, constants.pop("num_warps")


def kernel_files() -> list[str]:
    """Returns the kernels' files, without those that several kernels share."""
    return sorted(path.stem for path in KERNELS.glob("[!_]*.py"))


def configurations() -> Iterator[Configuration]:
    """Returns what the launchers use at model shapes: every kernel, mask kind, tile shape and element type.

    A function of kernels whose tiles depend on the generation takes it, and serves the architectures of that table.
    """
    for name in kernel_files():
        if f"_{name}" not in globals():
            raise LookupError(f"{__file__}: write _{name}(), the configurations of kernels/{name}.py")
        own = globals()[f"_{name}"]
        if not inspect.signature(own).parameters:
            yield from own()
            continue
        for generation, architectures in GENERATIONS.items():
            for configuration in own(generation):
                yield replace(configuration, architectures=architectures)


def _swoosh():
    from fastasr.kernels import swoosh

    kinds = {"no mask": 0, "full mask": 1, "row mask": 2, "column mask": 3}
    for dtype in ("fp32", "bf16", "fp16"):
        types = dict.fromkeys(("X", "MASK", "Y", "GRAD", "DX"), dtype)
        for label, kind in kinds.items():
            if dtype == "fp16" and label != "column mask":
                continue
            if kind >= 2:
                forward, backward = swoosh.forward_tile, swoosh.backward_tile
                tile = {"BLOCK_R": 8, "BLOCK_C": 256, "GROUPED": False}
            else:
                forward, backward = swoosh.forward_flat, swoosh.backward_flat
                tile = {"TAIL": False, "BLOCK": swoosh.BLOCK}
            common = {"RIGHT": False, "KIND": kind, **tile, **({"MASK": None} if kind == 0 else {})}
            divisible = ("columns",)
            yield Configuration(f"swoosh forward, {label}, {dtype}", forward, types, common, 4, divisible)
            for output in (False, True):
                constants = {**common, "OUTPUT": output, **({} if output else {"Y": None})}
                name = f"swoosh backward{' + output' if output else ''}, {label}, {dtype}"
                yield Configuration(name, backward, types, constants, 4, divisible)
    types = dict.fromkeys(("X", "Y"), "bf16")
    base = {"RIGHT": True, "KIND": 0, "MASK": None, "BLOCK": swoosh.BLOCK}
    yield Configuration("swooshR forward, tail, bf16", swoosh.forward_flat, types, {**base, "TAIL": True}, 4)
    types = dict.fromkeys(("X", "Y", "MASK"), "bf16")
    narrow = {"RIGHT": True, "KIND": 3, "GROUPED": True, "BLOCK_R": 64, "BLOCK_C": 32}
    name = "swooshR forward, groups, column mask of 32, bf16"
    yield Configuration(name, swoosh.forward_tile, types, narrow, 4, ("columns",))
    one = {"RIGHT": True, "KIND": 2, "GROUPED": False, "BLOCK_R": 64, "BLOCK_C": 32, "columns": 1}
    yield Configuration("swooshR forward, row mask, one column, bf16", swoosh.forward_tile, types, one, 4)


def _bias_norm():
    from fastasr.kernels import _parts, bias_norm

    def blocks(kernel: str, channels: int) -> tuple[int, int, int]:
        if kernel == "forward":
            return bias_norm._forward_blocks(channels)
        block_c = bias_norm._padded(channels)
        return max(1, _parts.ELEMENTS // block_c), block_c, _parts.WARPS

    parts = {"DBIAS_PARTS": "fp32", "DLOG_SCALE_PARTS": "fp32"}
    names = ("X", "BIAS", "LOG_SCALE", "Y", "GRAD", "DX", "DBIAS", "DLOG_SCALE")

    def both(channels: int, label: str, types: dict):
        for kernel in ("forward", "backward"):
            block_r, block_c, warps = blocks(kernel, channels)
            constants = {"BLOCK_R": block_r, "BLOCK_C": block_c}
            name, function = (
                f"bias_norm {kernel}, C={channels}, {label}",
                getattr(bias_norm, f"{kernel}_kernel"),
            )
            yield Configuration(name, function, types, constants, warps, ("C",))

    for dtype in DTYPES:
        for channels in (512,) if dtype == "fp16" else (192, 512, 768, 2048, 8192):
            yield from both(channels, dtype, dict.fromkeys(names, dtype) | parts)
    mixed = dict.fromkeys(names, "fp32") | parts | {"X": "bf16", "DX": "bf16"}
    yield from both(512, "x bf16", mixed)
    block_r, block_c, warps = blocks("backward", 1)
    one = {"BLOCK_R": block_r, "BLOCK_C": block_c, "C": 1}  # Triton makes integers that are 1 constants
    yield Configuration("bias_norm backward, C=1, x bf16", bias_norm.backward_kernel, mixed, one, warps)
    for block_p in (128, 256, 512):
        constants, warps = _adding(block_p)
        name = f"bias_norm parts, {block_p}"
        yield Configuration(name, bias_norm.add_parts_kernel, mixed, constants, warps, ("C",))


def _bypass():
    from fastasr.kernels import _parts, bypass

    names = ("X_ORIG", "X", "SCALE", "Y", "GRAD", "DX_ORIG", "DX", "DSCALE")
    every = {dtype: dict.fromkeys(names, dtype) for dtype in ("fp32", "bf16", "fp16")}
    every["x bf16"] = every["fp32"] | {"X": "bf16", "DX": "bf16"}
    for dtype, types in every.items():
        types = types | {"PARTS": "fp32"}
        for block_c in (256, 32) if dtype in ("fp32", "bf16") else (256,):
            for kernel, elements, warps in (
                ("forward", 2048, bypass.NUM_WARPS),
                ("backward", _parts.ELEMENTS, _parts.WARPS),
            ):
                constants = {"BLOCK_R": elements // block_c, "BLOCK_C": block_c}
                function = getattr(bypass, f"{kernel}_kernel")
                name = f"bypass {kernel}, tile {elements // block_c}x{block_c}, {dtype}"
                yield Configuration(name, function, types, constants, warps, ("columns",))
    one = {"BLOCK_R": _parts.ELEMENTS // 32, "BLOCK_C": 32, "columns": 1}
    types = every["fp32"] | {"PARTS": "fp32"}
    name = "bypass backward, one column, fp32"
    yield Configuration(name, bypass.backward_kernel, types, one, _parts.WARPS)
    for block_p in (128, 256):
        constants, warps = _adding(block_p)
        types = {"PARTS": "fp32", "DSCALE": "fp32"}
        name = f"bypass parts, {block_p}"
        yield Configuration(name, bypass.add_parts_kernel, types, constants, warps, ("columns",))


def _nonlin_attention():
    from fastasr.kernels import nonlin_attention as module

    names = ("P", "X", "SUMS", "Y", "U", "GRAD", "DX", "DP")
    tile = {"BLOCK_T": module.BLOCK_T, "BLOCK_C": module.BLOCK_C}
    for dtype in ("fp32", "bf16", "fp16"):
        types = dict.fromkeys(names, dtype)
        for kernel in ("gate", "product", "operands", "gradient"):
            function = getattr(module, f"{kernel}_kernel")
            constants = tile if kernel == "product" else tile | {"PRECISE": dtype == "fp32"}
            name = f"nonlin_attention {kernel}, {dtype}"
            divisible = ("width", "stride")
            yield Configuration(name, function, types, constants, module.NUM_WARPS, divisible)


def _residual_norm(generation: int):
    from fastasr.kernels import residual_norm

    inputs, outputs = ("X", "UPDATE", "CANDIDATE", "HIDDEN", "GRAD"), ("Y", "DX", "DUPDATE", "DSUM")
    parameters = ("MASK", "WEIGHT", "BIAS", "DWEIGHT", "DBIAS")
    shares = {"fp32": "fp64", "bf16": "fp32", "fp16": "fp32"}
    plain = {"CANDIDATE": None, "HIDDEN": None, "MASK": None, "ACTIVATION": 0}
    gated, masked = {"MASK": None, "ACTIVATION": 1}, {"ACTIVATION": 1}
    strides = ("C", "x_stride", "update_stride", "candidate_stride", "hidden_stride")

    def configuration(
        label: str, kernel: str, dtype: str, channels: int, constants: dict, parameter: str = "fp32"
    ):
        block_r, block_c, warps = residual_norm._blocks(channels, residual_norm.forward_elements(generation))
        if kernel == "backward":
            elements, warps, _ = residual_norm.backward_tile(
                DTYPES[dtype], "CANDIDATE" not in constants, "MASK" not in constants, generation
            )
            block_r = max(1, elements // block_c)
        return Configuration(
            f"residual_norm {kernel}, {label}, {dtype}",
            getattr(residual_norm, f"{kernel}_kernel"),
            dict.fromkeys((*inputs, *outputs), dtype)
            | dict.fromkeys(parameters, parameter)
            | {"PARTS": shares[dtype]},
            constants | {"BLOCK_R": block_r, "BLOCK_C": block_c},
            warps,
            strides if channels > 1 else (),
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
    # layer_norm_lstm and conv_spatial_gate, which launch add_parts_kernel too, take 16 columns
    sixteen = (({"BLOCK_P": 128, "BLOCK_C": 16}, 4), ({"BLOCK_P": 2048, "BLOCK_C": 16}, 16))
    for constants, warps in (_adding(128), _adding(256), *sixteen):
        block_p = "{BLOCK_P}x{BLOCK_C}".format(**constants)
        for dtype, parameter in (("fp32", "fp32"), ("fp64", "fp32"), ("fp32", "bf16")):
            name = f"residual_norm parts, {block_p}, {dtype}" + ", bf16 sums" * (parameter == "bf16")
            types = dict.fromkeys(parameters, parameter) | {"PARTS": dtype}
            yield Configuration(name, residual_norm.add_parts_kernel, types, constants, warps, ("C",))


def _linear_activation():
    from fastasr.kernels import linear_activation as kernels

    flat = {"TAIL": False, "BLOCK": kernels.BLOCK}
    tile = {"BLOCK_R": kernels.BLOCK_R, "BLOCK_C": kernels.BLOCK_C}
    for dtype in ("fp32", "bf16"):
        types = dict.fromkeys(("Z", "Y", "GRAD", "DZ"), dtype) | {"PARTS": "fp32"}
        for label, number in (("silu", 1), ("gelu", 4)):
            for name, kernel, constants in (
                ("forward", kernels.forward_kernel, flat),
                ("backward", kernels.backward_kernel, tile),
            ):
                name = f"linear_activation {name}, {label}, {dtype}"
                constants = {"ACTIVATION": number, **constants}
                yield Configuration(name, kernel, types, constants, kernels.NUM_WARPS, ("C",))


def _depthwise_conv2d():
    from fastasr.kernels import depthwise_conv2d as conv

    parts = {"BLOCK_P": conv.MAX_PARTS, "BLOCK_C": conv.BLOCK_C}
    for dtype in DTYPES:
        types = dict.fromkeys(("X", "TABLE", "BIAS", "Y", "G", "DWEIGHT", "DBIAS"), dtype) | {"PARTS": "fp32"}
        yield from _depthwise("depthwise_conv2d", dtype, types, 7, residual=False)
        name = f"depthwise_conv2d weight gradient, {dtype}"
        yield _taps_gradients(
            name, types, 7, Map(19, 19, 7, 3), ("C", "g_batch", "g_time", "x_batch", "x_time")
        )
        name = f"depthwise_conv2d parts, {dtype}"
        yield Configuration(name, conv.add_parts_kernel, types, parts, conv.NUM_WARPS, ("C",))


def _depthwise_conv_residual():
    divisible = ("C", "g_batch", "g_time", "x_batch", "x_time")
    for dtype in DTYPES:
        types = dict.fromkeys(("X", "Y", "G"), dtype) | dict.fromkeys(("TABLE", "BIAS", "PARTS"), "fp32")
        yield from _depthwise("depthwise_conv_residual", dtype, types, 3, residual=True)
        yield _taps_gradients(f"depthwise_conv_residual weight gradient, {dtype}", types, 3, LINE, divisible)


def _depthwise(op: str, dtype: str, types: dict, taps: int, residual: bool):
    from fastasr.kernels import depthwise_conv2d as conv

    tile = conv.form(taps, 1500, DTYPES[dtype]) | {"RESIDUAL": residual}
    for name, constants in (
        ("forward", {**tile, "TURNED": False}),
        ("input gradient", {**tile, "TURNED": True, "BIAS": None}),
    ):
        name = f"{op} {name}, {dtype}"
        yield Configuration(name, conv.forward_kernel, types, constants, conv.NUM_WARPS, ("C",))


def _taps_gradients(
    name, types, taps: int, shape: Map, divisible, tiled=(False, False), chunked: bool = False
):
    from fastasr.kernels import _sliding_taps as sliding

    steps = {name: sliding.BLOCK_C * here for name, here in zip(("G_STEP", "X_STEP"), tiled, strict=True)}
    segments = sliding.Segments(1500, 20, 1500, taps, 1, 64, DTYPES[types["G"]])
    constants = segments.form(shape) | steps | {"CHUNKED": chunked}
    divisible = (*divisible, "g_tile", "x_tile")
    return Configuration(name, sliding.gradient_kernel, types, constants, sliding.NUM_WARPS, divisible)


def _gated_depthwise_conv():
    from fastasr.kernels import gated_depthwise_conv as conv

    inputs = ("H", "CACHE", "WEIGHT", "CAUSAL_WEIGHT", "CHUNK_SCALE", "BIAS", "CAUSAL_BIAS", "GRAD")
    between = ("U", "Q", "R", "V", "G", "X")
    outputs = ("Y", "DH", "DCACHE", "DWEIGHT", "DBIAS", "DCAUSAL_WEIGHT", "DCAUSAL_BIAS", "DCHUNK_SCALE")
    chunk_causal = ("CACHE", "CAUSAL_WEIGHT", "CHUNK_SCALE", "CAUSAL_BIAS", "DCACHE", "DCAUSAL_WEIGHT")
    absent = dict.fromkeys((*chunk_causal, "DCAUSAL_BIAS"))
    divisible = ("C", "time_stride", "batch_stride", "grad_time_stride", "grad_batch_stride")
    block_c = {"BLOCK_C": conv.BLOCK_C}
    for dtype in ("fp32", "bf16"):
        types = dict.fromkeys((*inputs, *between, *outputs), dtype)
        types |= {"MASK": "u8", "TABLE": "fp32", "PARTS": "fp32"}
        for form, none in (("plain", absent), ("chunks", {})):
            chunked = form == "chunks"
            outer = none | conv.convolving(31, 32 if chunked else 1500, chunked)
            only_q = dict.fromkeys(("R", "V")) if form == "plain" else {}
            for kernel, constants in (
                ("gate", block_c | none | {"BLOCK_T": conv.BLOCK_T, "BLOCK_K": conv.BLOCK_K}),
                ("forward", outer | {"ACTIVATION": 1}),
                ("output_gradient", outer | only_q | {"ACTIVATION": 1}),
                ("input_gradient", outer | {"TILED": True}),
                ("add_parts", block_c | none | {"BLOCK_P": conv.MAX_PARTS}),
            ):
                name = f"gated_depthwise_conv {kernel.replace('_', ' ')}, {form}, {dtype}"
                function = getattr(conv, f"{kernel}_kernel")
                yield Configuration(name, function, types, constants, conv.NUM_WARPS, divisible)
            name = f"gated_depthwise_conv weight gradient, {form}, {dtype}"
            strides = ("C", "g_batch", "g_time", "x_batch", "x_time")
            yield _taps_gradients(name, types, 31, LINE, strides, (True, True), chunked)
        name = f"gated_depthwise_conv weight gradient, no activation, {dtype}"
        yield _taps_gradients(name, types, 31, LINE, strides, (False, True))
        rows = absent | conv.convolving(31, 1500, False) | {"TILED": False}
        name = f"gated_depthwise_conv input gradient, no activation, {dtype}"
        yield Configuration(name, conv.input_gradient_kernel, types, rows, conv.NUM_WARPS, divisible)
        silu = conv.convolving(31, 1500, False) | absent | {"ACTIVATION": 2}
        for kernel, constants in (("forward", silu), ("output_gradient", silu | {"R": None, "V": None})):
            name = f"gated_depthwise_conv {kernel.replace('_', ' ')}, SiLU, {dtype}"
            function = getattr(conv, f"{kernel}_kernel")
            yield Configuration(name, function, types, constants, conv.NUM_WARPS, divisible)
        name = f"gated_depthwise_conv edge gradient, chunks, {dtype}"
        constants = block_c | {"BLOCK_R": conv.BLOCK_R}
        yield Configuration(name, conv.edge_gradient_kernel, types, constants, conv.EDGE_WARPS, divisible)


def _conv_spatial_gate():  # the weight's gradient is that of gated_depthwise_conv
    from fastasr.kernels import conv_spatial_gate as gate
    from fastasr.kernels import residual_norm

    like = ("FACTOR", "GATE", "U", "Y", "GRAD", "Q", "DFACTOR", "DGATE")
    parameters = ("NORM_WEIGHT", "NORM_BIAS", "WEIGHT", "BIAS", "TABLE", "DWEIGHT", "DBIAS")
    divisible = ("C", "x_batch", "x_time")
    tile = gate.convolving(31, 750)
    for dtype in ("fp32", "bf16", "fp16"):
        types = dict.fromkeys(like, dtype) | dict.fromkeys(parameters, "fp32") | {"MASK": "u8"}
        types |= {"PARTS": "fp64" if dtype == "fp32" else "fp32"}
        for activation, label in ((0, ""), (4, ", gelu")):
            constants = {**tile, "ACTIVATION": activation}
            for name in ("forward", "output_gradient"):
                kernel = getattr(gate, f"{name}_kernel")
                name = f"conv_spatial_gate {name.replace('_', ' ')}{label}, {dtype}"
                yield Configuration(name, kernel, types, constants, gate.NUM_WARPS, divisible)
        name = f"conv_spatial_gate input gradient, {dtype}"
        yield Configuration(name, gate.input_gradient_kernel, types, tile, gate.NUM_WARPS, divisible)
        if dtype == "fp16":
            continue
        for channels in (512, 1536):
            whole = residual_norm._blocks(channels, gate.NORMALISE_ELEMENTS, gate.NORMALISE_WARPS)
            parts = (max(1, gate.GRADIENT_ELEMENTS // whole[1]), whole[1], gate.GRADIENT_WARPS)
            for name, (block_r, block_c, warps) in (("normalise", whole), ("norm_gradient", parts)):
                constants = {"BLOCK_R": block_r, "BLOCK_C": block_c, "MASK": None}
                constants |= {"TILE_K": gate.BLOCK_K, "TILE_C": gate.BLOCK_C}
                kernel = getattr(gate, f"{name}_kernel")
                name = f"conv_spatial_gate {name.replace('_', ' ')}, C={channels}, {dtype}"
                yield Configuration(name, kernel, types, constants, warps, divisible, ("eps",))


def _conv_subsampling():
    from fastasr.kernels import conv_subsampling as conv
    from fastasr.kernels import depthwise_conv2d

    parts = {"BLOCK_P": 4 * conv.MAX_PARTS, "BLOCK_C": conv.BLOCK_SUM}
    like = ("G", "X", "WEIGHT", "BIAS", "DEPTHWISE", "DEPTHWISE_BIAS", "Y", "DWEIGHT", "DBIAS")
    for dtype in (*PRODUCTS, "fp16"):
        types = dict.fromkeys(like, _element(dtype)) | {"MASK": "u8", "PARTS": "fp32", "SHARES": "fp32"}
        with _setting(dtype) as torch_dtype:
            shapes = conv.tiles(torch_dtype)
        for name, tile in shapes.items():
            constants = dict(tile)
            warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
            kernel = getattr(conv, f"{name}_kernel")
            name = f"conv_subsampling {name.replace('_', ' ')}, {dtype}"
            yield Configuration(name, kernel, types, constants, warps, ("C",), stages=stages)
        if dtype != "tf32":
            name = f"conv_subsampling add parts, {dtype}"
            yield Configuration(name, depthwise_conv2d.add_parts_kernel, types, parts, 4, ("C",))


def _layer_norm_lstm():
    from fastasr.kernels import layer_norm_lstm as module

    like = ("PRODUCT", "WEIGHT", "DGATES")
    own = ("GATE_WEIGHT", "GATE_BIAS", "CELL_WEIGHT", "CELL_BIAS", "Y", "GRAD")
    wide = ("RECURRENT", "HIDDEN", "CELL", "NORMED", "SCALES", "DHIDDEN", "DCELL", "BEFORE")
    for dtype, parameters in (*((dtype, "fp32") for dtype in PRODUCTS), ("bf16", "bf16")):
        types = dict.fromkeys(like, _element(dtype)) | dict.fromkeys(wide, "fp32")
        types |= dict.fromkeys(own, parameters) | {"ARRIVED": "i32", "PARTS": "fp64"}
        for units, batch, label in ((512, 16, ""), (512, 1, ", one step")):
            with _setting(dtype) as torch_dtype:
                shape = module.shapes(units, batch, 128, torch_dtype)
            warps, stages, registers = (shape.pop(key) for key in ("num_warps", "num_stages", "maxnreg"))
            absent = {"ARRIVED": None, "NORMED": None, "SCALES": None} if batch == 1 else {}
            for name in ("forward",) if batch == 1 else ("forward", "backward"):
                kernel = getattr(module, f"{name}_kernel")
                narrow = ", bf16 parameters" * (parameters == "bf16")
                name = f"layer_norm_lstm {name}, H={units}{label}{narrow}, {dtype}"
                numbers = ("units",), ("eps",), stages
                yield Configuration(
                    name, kernel, types, shape | absent, warps, *numbers, most_registers=registers
                )
    constants = {"BLOCK_R": module.PART_ROWS, "BLOCK_C": module.BLOCK_P}
    name, divisible = "layer_norm_lstm norm gradient", ("row", "columns")
    yield Configuration(name, module.norm_gradient_kernel, types, constants, 4, divisible)


def _toeplitz_attention(generation: int):
    from fastasr.kernels import toeplitz_attention as module

    like = (
        "X",
        "VALUE",
        "GATE",
        "GRAD",
        "MIXED",
        "QUERY",
        "KEY",
        "ACTIVE",
        "G",
        "DGATE",
        "Y",
        "WEIGHTS",
        "SLOPES",
        "DQUERY",
        "DKEY",
        "DV",
        "DVALUE",
        "DX",
    )
    wide = ("WEIGHT", "SHIFT", "BIAS", "DROPOUT", "PARTS", "OUT")
    strides = [f"{name}_{of}" for name in ("x", "value", "gate", "grad") for of in ("time", "batch")]
    plain = {"HIDDEN": None, "DROPOUT": None}
    extra = {"prepare": module.PREPARE, "values": module.VALUES, "parameters": module.PARAMETERS}

    def configuration(name: str, label: str, dtype: str, d: int = 128, v: int = 1024, full=True, **constants):
        with _setting(dtype) as torch_dtype:
            width, shapes = module.tiles(d, v, torch_dtype, generation, "DROPOUT" not in constants, full)
        options = dict(shapes[name] if name in shapes else extra.get(name, {"num_warps": 4}))
        warps, stages = options.pop("num_warps"), options.pop("num_stages", 3)
        element = _element(dtype)
        pointers = dict.fromkeys(like, element) | dict.fromkeys(wide, "fp32")
        pointers |= {"PADDING": "i8", "HIDDEN": "i8"} | ({"PARTS": "fp64"} if element == "fp32" else {})
        return Configuration(
            f"toeplitz_attention {name}{label and ', ' + label}, d={d}, V={v}, {dtype}",
            getattr(module, f"{name}_kernel"),
            pointers,
            {"CAUSAL": True, "ACTIVATION": 1, "WIDTH": width} | options | constants,
            warps,
            ("D", "V", *strides, "out_time", "stride"),
            ("scale",),
            stages,
        )

    for name in ("forward", "slopes"):
        for dtype in PRODUCTS if name == "forward" else ("fp32", "bf16", "fp16"):
            yield configuration(name, "", dtype, **plain)
            yield configuration(name, "both ways, padding, dropout", dtype, CAUSAL=False)
        yield configuration(name, "both ways, padding", "bf16", CAUSAL=False, DROPOUT=None)
    yield configuration("forward", "", "bf16", 256, 512, **plain)
    yield configuration("forward", "", "fp16", **plain)
    yield configuration("forward", "few rows", "bf16", full=False, **plain)
    for dtype in ("fp32", "bf16"):
        forward = dict.fromkeys(("GATE", "GRAD", "MIXED", "G", "DGATE"))
        yield configuration("prepare", "forward, padding", dtype, **forward)
        yield configuration("prepare", "backward", dtype, PADDING=None, HIDDEN=None)
        yield configuration("parameters", "", dtype)
        for block_p in (128, module.MAX_PARTS):
            yield configuration("add_parts", f"parts, {block_p}", dtype, BLOCK_P=block_p, BLOCK_C=16)
        yield configuration("diagonals", "", dtype)
        yield configuration("values", "", dtype)


def _segment_attention(generation: int):
    from fastasr.kernels import segment_attention as module

    like = ("Q", "K", "V", "G", "Y", "DQ", "DK", "DV")
    wide = dict.fromkeys(("MAXIMUM", "INVERSE", "DELTA", "DROPOUT"), "fp32")
    bounds = dict.fromkeys(("LENGTHS", "HISTORY"), "i64")
    strides = [f"{name}_{of}" for name in "gqkv" for of in ("time", "batch")] + ["y_time"]

    def configuration(name: str, label: str, dtype: str, dim: int = 64, lanes: int = 1876):
        everything = "dropout" in label
        with _setting(dtype) as torch_dtype:
            options = dict(module.tiles(dim, torch_dtype, generation, lanes, everything)[name])
        warps, stages = options.pop("num_warps"), options.pop("num_stages")
        remembers = everything or "step" in label
        absent = (
            () if everything else ("DROPOUT", "LENGTHS") if remembers else ("DROPOUT", "HISTORY", "LENGTHS")
        )
        fixed = {"DIM": dim, "HAS_MEMORY": remembers} | dict.fromkeys(absent)
        return Configuration(
            f"segment_attention {name}{label and ', ' + label}, {dtype}",
            getattr(module, f"{name}_kernel"),
            dict.fromkeys(like, _element(dtype)) | wide | bounds,
            fixed | options,
            warps,
            strides,
            ("scale",),
            stages,
        )

    for dtype in PRODUCTS:
        for name in ("forward", "queries", "keys"):
            yield configuration(name, "", dtype)
            yield configuration(name, "memory, dropout, lengths, history", dtype)
            if dtype == "bf16":
                yield configuration(name, "odd sizes", dtype, 150)
    yield configuration("forward", "", "fp16")
    yield configuration("forward", "a step of a stream", "bf16", lanes=21)


def _zipformer_attention_weights(generation: int):
    from fastasr.kernels import zipformer_attention_weights as module

    like = ("X", "K", "R", "W", "GRAD", "DX", "DS", "DK")
    strides = [f"{name}_{of}" for name in ("x", "k") for of in ("time", "batch")]
    strides += [f"{name}_{of}" for name in ("g", "w") for of in ("head", "batch", "row")] + ["ds_row"]
    masked = {"PADDING": "u8", "MASK": "u8"}

    def configuration(
        name: str, label: str, dtype: str, keys: int = 1500, dim: int = 32, pos_dim: int = 4, **constants
    ):
        with _setting(dtype) as torch_dtype:
            shapes = module.tiles(
                keys, dim, pos_dim, torch_dtype, generation, "mask" in label, "PENALTY" in constants
            )
        options, element = dict(shapes[name]), _element(dtype)
        warps, stages = options.pop("num_warps"), options.pop("num_stages")
        packed = pos_dim == 4 and element != "fp32"
        pointers = dict.fromkeys(like, element) | masked | ({"R": "i64"} if packed else {})
        pointers["PARTS"] = "fp64" if element == "fp32" else "fp32"
        fixed = {"DIM": dim, "POS_DIM": pos_dim, "PACKED": packed, "WIDE_POS": pos_dim, "PENALTY": False}
        fixed |= {"WINDOW": "chunks" in label} | ({} if "mask" in label else dict.fromkeys(masked))
        return Configuration(
            f"zipformer_attention_weights {name}{label and ', ' + label}, {dtype}",
            getattr(module, f"{name}_kernel"),
            pointers,
            fixed | options | constants,
            warps,
            strides,
            ("penalty", "limit"),
            stages,
        )

    for dtype in (*PRODUCTS, "fp16"):
        for name in ("forward", "queries", "keys", "positions"):
            yield configuration(name, "", dtype)
            if dtype == "fp16":
                continue
            if name in ("forward", "queries"):
                yield configuration(name, "chunks, padding, mask", dtype)
            if name == "forward":
                for keys in (100, 200, 400) if dtype == "bf16" else (50,):
                    yield configuration(name, f"{keys} keys", dtype, keys)
            if name == "queries":
                yield configuration(name, "penalty", dtype, PENALTY=True)
            if name == "keys":
                yield configuration(name, "chunks", dtype)
            yield configuration(name, "odd sizes", dtype, 1500, 40, 6)
    for dtype in ("fp32", "bf16"):
        types = {"PARTS": "fp64" if dtype == "fp32" else "fp32", "OUT": dtype}
        constants, warps = {"BLOCK": module.PARTS["BLOCK"]}, module.PARTS["num_warps"]
        name = f"zipformer_attention_weights parts, {dtype}"
        yield Configuration(name, module.add_parts_kernel, types, constants, warps, ("size",))


def _zipformer_attention(generation: int):
    from fastasr.kernels import zipformer_attention as module

    like = ("X", "K", "R", "V", "G", "Y", "DX", "DS", "DK", "DV")
    wide = dict.fromkeys(("MAXIMUM", "INVERSE", "DELTA"), "fp32")
    strides = [f"{name}_{of}" for name in ("x", "k", "v") for of in ("time", "batch")] + ["ds_row"]
    masked = {"PADDING": "u8", "MASK": "u8"}

    def configuration(
        name: str, label: str, dtype: str, dim: int = 32, pos_dim: int = 4, value_dim: int = 12
    ):
        with _setting(dtype) as torch_dtype:
            options = dict(
                module.tiles(dim, pos_dim, value_dim, torch_dtype, generation, "mask" in label)[name]
            )
        warps, stages, element = options.pop("num_warps"), options.pop("num_stages"), _element(dtype)
        packed = pos_dim == 4 and element != "fp32"
        fixed = {"DIM": dim, "POS_DIM": pos_dim, "VALUE_DIM": value_dim}
        fixed |= {"PACKED": packed, "WIDE_POS": pos_dim}
        fixed |= {"WINDOW": "chunks" in label} | ({} if "mask" in label else dict.fromkeys(masked))
        return Configuration(
            f"zipformer_attention {name}{label and ', ' + label}, {dtype}",
            getattr(module, f"{name}_kernel"),
            dict.fromkeys(like, element) | wide | masked | ({"R": "i64"} if packed else {}),
            fixed | options,
            warps,
            strides,
            stages=stages,
        )

    for dtype in (*PRODUCTS, "fp16"):
        for name in ("forward", "queries", "keys"):
            yield configuration(name, "", dtype)
            if dtype == "fp16":
                continue
            yield configuration(name, "chunks, padding, mask", dtype)
            yield configuration(name, "V=144", dtype, value_dim=144)
            yield configuration(name, "odd sizes", dtype, 40, 6, 20)


def _rel_attention(generation: int):
    from fastasr.kernels import rel_attention as module

    like = ("Q", "K", "V", "POS", "U", "W", "Y", "G", "DS", "DQ", "DK", "DV", "DU", "DW")
    wide = dict.fromkeys(("LSE", "INVERSE", "DELTA", "CONTENT"), "fp32")
    strides = [f"{name}_{of}" for name in ("q", "v") for of in ("time", "batch")]
    strides += ["k_batch", "g_batch", "ds_row", "width"]
    masks = {"PADDING": "u8", "MASK": "u8", "SEED": "i64"}

    def configuration(name: str, label: str, dtype: str, dim: int = 64, value: int = 64):
        hiding, dropping, element = "mask" in label, "dropout" in label, _element(dtype)
        with _setting(dtype) as torch_dtype:
            shapes = module.tiles(dim, value, torch_dtype, generation, hiding, dropping, "context" in label)
        shapes["biases"] = module.BIASES
        options = dict(shapes[name])
        warps, stages = options.pop("num_warps"), options.pop("num_stages", 3)
        types = dict.fromkeys(like, element) | wide | masks
        types |= {"PARTS": "fp64" if element == "fp32" else "fp32"}
        words = (("PADDING", "padding"), ("MASK", "mask"), ("SEED", "dropout"))
        absent = [name for name, word in words if word not in label]
        return Configuration(
            f"rel_attention {name}{label and ', ' + label}, {dtype}",
            getattr(module, f"{name}_kernel"),
            types | ({"DQ": "fp32"} if name == "queries" else {}),
            {"DIM": dim, "VALUE_DIM": value, "WINDOW": "context" in label, **dict.fromkeys(absent)} | options,
            warps,
            strides,
            ("scale", "factor"),
            stages,
        )

    for value in (64, 100):
        yield configuration("delta", "" if value == 64 else "odd sizes", "bf16", value=value)
    for dtype in PRODUCTS:
        for label in ("padding, mask", "padding, dropout", "padding, context"):
            if dtype != "bf16" and (dtype != "tf32" or "mask" in label):
                yield configuration("statistics", label, dtype)
    for name in ("forward", "queries", "keys"):
        yield configuration(name, "padding", "bf16")
        for dtype in PRODUCTS:
            yield configuration(name, "padding, mask", dtype)
            if dtype != "tf32":
                yield configuration(name, "padding, dropout", dtype)
        for dim in (96, 128, 144):  # blocks of 64 channels or of 128
            yield configuration(name, f"d={dim}, padding", "bf16", dim, dim)
        for label in ("padding, mask", "padding, dropout", "padding, mask, dropout"):
            yield configuration(name, f"d=128, {label}", "bf16", 128, 128)
        yield configuration(name, "padding, mask, dropout", "bf16")
        for dtype in ("fp32", "bf16"):
            yield configuration(name, "padding, context", dtype)
        for label in ("padding, dropout, context", "d=128, padding, context"):
            dim = 128 if "d=128" in label else 64
            yield configuration(name, label, "bf16", dim, dim)
    for dtype in PRODUCTS:
        for name in ("offsets", "positions"):
            yield configuration(name, "", dtype)
            if dtype != "tf32":
                yield configuration(name, "context", dtype)
    for dtype in ("fp32", "bf16"):
        yield configuration("biases", "", dtype)


def _rnnt_joiner(generation: int):
    from fastasr.kernels import rnnt_joiner as module

    like = dict.fromkeys(("AM", "LM", "HIDDEN", "WEIGHT", "BIAS", "DLOGITS", "DAM"))
    wide = dict.fromkeys(("PX", "PY", "GX", "GY", "DHIDDEN", "DA", "DLM"), "fp32")
    types = wide | dict.fromkeys(("STARTS", "SYMBOLS", "BOUNDARY"), "i64") | {"NORMALISER": "fp64"}
    extra = {
        "normalise": module.NORMALISE | {"BLOCK_S": 8},
        "frame_gradient": module.FRAME,
        "context_gradient": module.CONTEXT,
    }

    def configuration(name: str, label: str, dtype: str, d: int = 512, tile: dict | None = None, **constants):
        with _setting(dtype) as torch_dtype:
            options = dict(tile or (extra | module.tiles(d, torch_dtype, generation))[name])
        warps, stages, element = options.pop("num_warps"), options.pop("num_stages", 3), _element(dtype)
        precise = {"PRECISE": element == "fp32"} if name == "frame_gradient" else {}
        return Configuration(
            f"rnnt_joiner {name.replace('_', ' ')}{label and ', ' + label}, D={d}, {dtype}",
            getattr(module, f"{name}_kernel"),
            types
            | dict.fromkeys(like, element)
            | {"PARTS": "fp32" if name == "logits_gradient" and element != "fp32" else "fp64"},
            {"ACTIVATION": 3, "HAT": False, "SEED": None} | options | precise | constants,
            warps,
            ("width", "d_stride", "share", *(("D", "V") if d % 16 == 0 else ())),
            stages=stages,
        )

    for dtype in (*PRODUCTS, "fp16"):
        for name in ("scores", "logits_gradient"):
            yield configuration(name, "", dtype)
            if dtype == "fp16":
                continue
            yield configuration(name, "HAT", dtype, HAT=True, BOUNDARY=None, BIAS=None)
            if dtype == "bf16":
                yield configuration(name, "odd sizes", dtype, d=100)
        if dtype in ("tf32", "fp16"):
            continue
        for name in ("hidden", *extra):
            if dtype == "fp32" or name not in (
                "normalise",
                "context_gradient",
            ):  # their kernels are those of fp32
                yield configuration(name, "", dtype)
        yield configuration("frame_gradient", "few rows", dtype, tile=module.SHORT_FRAME)
        yield configuration("hidden", "relu, odd sizes", dtype, d=100, ACTIVATION=2, BOUNDARY=None)


def _rnnt_lattice():
    from fastasr.kernels import rnnt_lattice as module

    names = ("X", "Y", "SCORES", "SHARES", "COLUMN", "GRAD", "DX", "DY")
    types = dict.fromkeys(names, "fp32") | {"BOUNDARY": "i64"}
    yield from _lattices(module, "T", (40, 750), types, ("share_row",))  # T=2000 has the lanes of 750
    lanes, warps = module._lanes(750)
    constants = {"BLOCK": lanes, "MODIFIED": False, "BOUNDARY": None, "SHARES": None}
    name = "rnnt_lattice forward, no shares, T=750"
    yield Configuration(name, module.forward_kernel, types, constants, warps)


def _rnnt_pruned_lattice():
    from fastasr.kernels import rnnt_pruned_lattice as module

    names = ("X", "Y", "SCORES", "SHARES", "GRAD", "DX", "DY")
    types = dict.fromkeys(names, "fp32") | {"BOUNDARY": "i64", "STARTS": "i64"}
    yield from _lattices(module, "R", (5, 16), types)


def _tdt_lattice():
    from fastasr.kernels import tdt_lattice as module

    names = ("X", "Y", "Z", "SCORES", "SHARES", "CELLS_M", "CELLS_E", "GRAD", "DX", "DY", "DZ", "MASS")
    types = dict.fromkeys(names, "fp32") | dict.fromkeys(("BOUNDARY", "DURATIONS"), "i64")
    for symbols in (40, 600):
        lanes, warps = module._lanes(symbols)
        for kernel in ("forward", "backward"):
            function = getattr(module, f"{kernel}_kernel")
            name = f"tdt_lattice {kernel}, S={symbols}"
            yield Configuration(name, function, types, {"BLOCK": lanes}, warps)
    constants = {"BLOCK": lanes, "BOUNDARY": None, "SHARES": None}
    yield Configuration(
        "tdt_lattice forward, no shares, S=600", module.forward_kernel, types, constants, warps
    )


def _lattices(module, letter: str, sizes: tuple[int, ...], types: dict, divisible: tuple[str, ...] = ()):
    for size in sizes:
        lanes, warps = module._lanes(size)
        for modified in (False, True):
            label = f"{'modified' if modified else 'regular'}, {letter}={size}"
            for kernel in ("forward", "backward"):
                name = f"{module.__name__.rpartition('.')[2]} {kernel}, {label}"
                function, constants = (
                    getattr(module, f"{kernel}_kernel"),
                    {"BLOCK": lanes, "MODIFIED": modified},
                )
                yield Configuration(name, function, types, constants, warps, divisible)
