# SPDX-License-Identifier: Apache-2.0
"""Two 3 x 3 convolutions with stride 2, ReLU and mask between them, without the map h (B, H, W, C) in memory.

    z = W X, the first convolution's taps and bias times 9 pixels of x and a 1; h = ReLU(z), 0 where excluded
    y[b, t, f, c] = depthwise_bias[c] + sum_(tap) v[c, tap] h[b, 2t + i, 2f + j - left, c]
    With E_tap[c, k] = sum_(b, t, f : h > 0) g[b, t, f, c] X_tap[k, b, t, f], where X_9 is the 1:
    dv[c, tap] = sum_k W[c, k] E_tap[c, k]     dw[c, k] = sum_tap v[c, tap] E_tap[c, k]     dbias[c] = dw[c, 9]

Programs hold tiles of channels by pixels of y. For each tap of the second convolution they gather the patches of x and
multiply them with the weights again, 16 numbers deep, on tensor cores for 16-bit numbers: 2.25 times the products that
h has. Channels are the rows: a thread of a product has few rows and many columns, so it loads few weights v per tap.
A pixel outside of h or excluded has a patch of zeros without the 1, which gives 0, but NaN with an infinite weight:
programs that have one select too. In the gradients h is only a condition on g, which is an operand of a second product;
a program adds up E of three taps, as nine would spill. Where x is infinite, dv may
be NaN in place of the formula's number. Launches: forward 1, backward 2. dx, which features do not need, takes one
launch and torch's fold, because its kernel writes the 9 shares of each pixel of h.

Bytes: forward x and y; backward x and g, which the programs of three rows of taps read. A 20x3000x80 bf16 input with
256 channels is 157 MB of y: 47 us at 3.35 TB/s. The weights' gradients are added up in parts that depend on the shape
alone, and the parts in float64: results repeat bit for bit, without atomics.
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels._launch import as_bytes, cdiv, dot_options, launch
from fastasr.kernels._maps import add_map_taps
from fastasr.kernels._special import INTERPRETED

SIZES = ["frames", "width", "first_frames", "first_width", "out_frames", "out_width", "left", "rows"]
SLOTS = tl.constexpr(16)  # 9 taps, the bias, zeros: the depth of a product
MAX_PARTS = 256
LEAST_ROWS = 256  # A part has at least this many rows.
BLOCK_SUM = 8  # channels of a program that adds parts
# Both numbers of 16 bits of $3, 0 where the bits of $1 or $2 less one have a sign: where that float32 is not above 0.
BOTH_WHERE_POSITIVE = tl.constexpr(
    "{.reg .b32 a, b; sub.u32 a, $1, 1; sub.u32 b, $2, 1; prmt.b32 a, a, b, 0xffbb; not.b32 a, a; and.b32 $0, $3, a;}"
)


def tiles(dtype: torch.dtype) -> dict[str, dict]:
    """Returns the constants of the kernels by name: pixels and channels of a tile. With more pixels some would spill
    (tests/kernels/budgets.toml).
    """
    wide = dtype == torch.float32
    pixels = {"forward": 32 if wide else 64, "weight_gradient": 16 if wide else 64, "input_gradient": 64}
    rest = {"BLOCK_C": 64, "num_warps": 4, "num_stages": 1} | dot_options(dtype)
    return {name: {"BLOCK_P": number} | rest for name, number in pixels.items()}


@triton.jit
def _coefficients(WEIGHT, BIAS, c, C):
    """Returns the taps of the first convolution, its bias and zeros, [BLOCK_C, SLOTS]."""
    k = tl.arange(0, SLOTS)
    w = tl.load(WEIGHT + c[:, None] * 9 + k[None, :], mask=(c < C)[:, None] & (k < 9)[None, :], other=0.0)
    if BIAS is not None:
        bias = tl.load(BIAS + c, mask=c < C, other=0.0)
        w = tl.where((k == 9)[None, :], bias[:, None], w)
    return w


@triton.jit
def _patches(X, pixel, width, seen):
    """Returns the 9 pixels of x from ``pixel`` on, a 1 and zeros, [SLOTS, BLOCK_P]; zeros alone where not ``seen``."""
    k = tl.arange(0, SLOTS)
    at = X + pixel[None, :] + (k // 3 * width + k % 3)[:, None]
    one = ((k == 9)[:, None] & seen[None, :]).to(tl.float32).to(X.dtype.element_ty)
    return tl.load(at, mask=(k < 9)[:, None] & seen[None, :], other=one)


@triton.jit
def _seen(MASK, frame, column, there, first_width):
    """Returns which of h's frames from ``frame`` on count (bits 0 to 2) and which columns from ``column`` on exist
    (bits 3 to 5), [BLOCK_P].
    """
    width = first_width.to(tl.uint32)
    bits = tl.zeros_like(column)
    for k in tl.static_range(3):
        counts = there
        if MASK is not None:
            counts = tl.load(MASK + (frame + k), mask=there, other=0) != 0
        bits |= counts.to(tl.int32) << k
        bits |= ((column + k).to(tl.uint32) < width).to(tl.int32) << (k + 3)
    return bits


@triton.jit
def _tap_seen(bits, i, j):
    return ((bits >> i) & (bits >> (j + 3)) & 1) != 0


@triton.jit
def _convolved(X, DEPTHWISE, w, pixel, bits, width, c, C, FINITE: tl.constexpr):
    """Returns y of pixels [BLOCK_C, BLOCK_P] without its bias; FINITE says that of the weights w."""
    y = tl.zeros([w.shape[0], pixel.shape[0]], tl.float32)
    for i in range(3):
        for j in tl.range(0, 3, loop_unroll_factor=3 if FINITE else 1):
            x = _patches(X, pixel + 2 * (i * width + j), width, _tap_seen(bits, i, j))
            h = tl.maximum(tl.dot(w, x), 0.0, propagate_nan=tl.PropagateNan.ALL)
            if not FINITE:
                # A patch of zeros has given NaN. Its product with the weights of a bias of 1 is 0.
                one = tl.broadcast_to((tl.arange(0, SLOTS) == 9)[None, :], w.shape).to(w.dtype)
                h = tl.where(tl.dot(one, x) == 0.0, 0.0, h)
            v = tl.load(DEPTHWISE + c * 9 + (3 * i + j), mask=c < C, other=0.0).to(tl.float32)
            y = tl.fma(v[:, None], h, y)
    return y


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    X, WEIGHT, BIAS, DEPTHWISE, DEPTHWISE_BIAS, MASK, Y,
    frames, width, first_frames, first_width, out_frames, out_width, left, rows, C,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # A row: one pixel of y, (b, t, f).
    c_tiles = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    c = pid % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    row = pid // c_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    f, t, b = row % out_width, row // out_width % out_frames, row // out_width // out_frames
    pixel = (b * frames + 4 * t) * width + 4 * f - 2 * left
    bits = _seen(MASK, b * first_frames + 2 * t, 2 * f - left, row < rows, first_width)
    w = _coefficients(WEIGHT, BIAS, c, C)
    if tl.max(tl.where(tl.abs(w.to(tl.float32)) < float("inf"), 0, 1)) == 0:
        y = _convolved(X, DEPTHWISE, w, pixel, bits, width, c, C, True)
    else:
        y = _convolved(X, DEPTHWISE, w, pixel, bits, width, c, C, False)
    if DEPTHWISE_BIAS is not None:
        y += tl.load(DEPTHWISE_BIAS + c, mask=c < C, other=0.0).to(tl.float32)[:, None]
    at = row.to(tl.int64)[None, :] * C + c[:, None]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=(c < C)[:, None] & (row < rows)[None, :])


@triton.jit
def _where_positive(z, g):
    """Returns g, 0 where z <= 0. The compiler's own selection takes six instructions for two numbers of 16 bits."""
    if INTERPRETED or g.dtype.primitive_bitwidth == 32:
        active = tl.where(z <= 0.0, 0.0, g)
    else:
        active = tl.inline_asm_elementwise(
            BOTH_WHERE_POSITIVE, "=r,r,r,r", [z, g], dtype=g.dtype, is_pure=True, pack=2
        )
    return active


@triton.jit(do_not_specialize=[*SIZES, "rows_per_part"])
def weight_gradient_kernel(
    G, X, WEIGHT, BIAS, DEPTHWISE, MASK, PARTS,
    frames, width, first_frames, first_width, out_frames, out_width, left, rows, rows_per_part, C,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # A row i of taps over a part's pixels. PARTS: (parts, 3, 10, C), its share of dw and dbias; then (parts, 10, C), dv
    # and the sum of G.
    c_tiles = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    c = pid % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    i, part = pid // c_tiles % 3, pid // c_tiles // 3
    parts = tl.num_programs(0) // (3 * c_tiles)
    in_row = c < C
    w = _coefficients(WEIGHT, BIAS, c, C)
    zero = tl.zeros([BLOCK_C, SLOTS], tl.float32)
    e = (zero, zero, zero)
    PRECISE: tl.constexpr = G.dtype.element_ty == tl.float32
    # Threads keep sums apart where they have registers.
    LANES: tl.constexpr = 1 if PRECISE else BLOCK_P // 4
    total = tl.zeros([BLOCK_C, LANES], tl.float64 if PRECISE else tl.float32)
    start = part * rows_per_part
    end = tl.minimum(start + rows_per_part, rows)
    while start < end:
        row = start + tl.arange(0, BLOCK_P)
        f, t, b = row % out_width, row // out_width % out_frames, row // out_width // out_frames
        at = row.to(tl.int64)[None, :] * C + c[:, None]
        g = tl.load(G + at, mask=in_row[:, None] & (row < end)[None, :], other=0.0)  # [BLOCK_C, BLOCK_P]
        if i == 0:
            shares = tl.reshape(g.to(tl.float32), [BLOCK_C, BLOCK_P // LANES, LANES])
            total += tl.sum(shares, axis=1).to(total.dtype)
        kept = row < end
        if MASK is not None:
            kept = tl.load(MASK + b * first_frames + 2 * t + i, mask=kept, other=0) != 0
        pixel = (b * frames + 4 * t + 2 * i) * width + 4 * f - 2 * left
        for j in tl.static_range(3):
            seen = kept & ((2 * f + j - left).to(tl.uint32) < first_width.to(tl.uint32))
            x = _patches(X, pixel + 2 * j, width, seen)
            active = _where_positive(tl.dot(w, x), g)
            # Triton has no unpacking of tuples.
            e = e[:j] + (tl.dot(active, tl.trans(x), e[j]),) + e[j + 1 :]  # noqa: RUF005
        start += BLOCK_P
    k = tl.arange(0, SLOTS)
    first = PARTS + (part * 3 + i).to(tl.int64) * 10 * C + c
    second = PARTS + (parts * 3 + part).to(tl.int64) * 10 * C + c
    dw = tl.zeros([BLOCK_C, SLOTS], tl.float64)
    for j in tl.static_range(3):
        v = tl.load(DEPTHWISE + c * 9 + (3 * i + j), mask=in_row, other=0.0)
        own = e[j].to(tl.float64)
        dw += v.to(tl.float64)[:, None] * own
        dv = tl.sum(w.to(tl.float64) * own, axis=1)
        tl.store(second + (3 * i + j) * C, dv.to(tl.float32), mask=in_row)
    if i == 0:
        tl.store(second + 9 * C, tl.sum(total, axis=1).to(tl.float32), mask=in_row)
    keep = in_row[:, None] & (k < 10)[None, :]
    tl.store(first[:, None] + k[None, :] * C, dw.to(tl.float32), mask=keep)


@triton.jit(do_not_specialize=["parts"])
def add_kernel(
    PARTS, DWEIGHT, DBIAS, DDEPTHWISE, DDEPTHWISE_BIAS, parts, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    # program_id(1) is the convolution.
    if tl.program_id(1) == 0:
        add_map_taps(PARTS, DWEIGHT, DBIAS, 3 * parts, C, 9, BLOCK_P, BLOCK_C)
    else:
        PARTS += 3 * parts.to(tl.int64) * 10 * C
        add_map_taps(PARTS, DDEPTHWISE, DDEPTHWISE_BIAS, parts, C, 9, BLOCK_P, BLOCK_C)


@triton.jit(do_not_specialize=SIZES)
def input_gradient_kernel(
    G, X, WEIGHT, BIAS, DEPTHWISE, MASK, SHARES,
    frames, width, first_frames, first_width, out_frames, out_width, left, rows, C,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # A row: one pixel of h. SHARES (B, 9, H W): what it adds to its pixels of x.
    row = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    column, frame = row % first_width, row // first_width % first_frames
    b = row // first_width // first_frames
    seen = row < rows
    if MASK is not None:
        seen = tl.load(MASK + b * first_frames + frame, mask=seen, other=0) != 0
    x = _patches(X, (b * frames + 2 * frame) * width + 2 * column, width, seen)
    total = tl.zeros([BLOCK_P, SLOTS], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        w = _coefficients(WEIGHT, BIAS, c, C)
        dh = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        for tap in range(9):
            t, f = frame - tap // 3, column + left - tap % 3  # twice those of y
            there = (
                seen & (t >= 0) & (t < 2 * out_frames) & (f >= 0) & (f < 2 * out_width) & ((t | f) % 2 == 0)
            )
            at = ((b * out_frames + t // 2) * out_width + f // 2).to(tl.int64)[None, :] * C + c[:, None]
            g = tl.load(G + at, mask=(c < C)[:, None] & there[None, :], other=0.0)  # [BLOCK_C, BLOCK_P]
            v = tl.load(DEPTHWISE + c * 9 + tap, mask=c < C, other=0.0).to(tl.float32)
            dh = tl.fma(v[:, None], tl.where(there[None, :], g.to(tl.float32), 0.0), dh)
        dz = tl.where(tl.dot(w, x) <= 0.0, 0.0, dh).to(w.dtype)
        total = tl.dot(tl.trans(dz), w, total)
    k = tl.arange(0, SLOTS)
    size = first_frames * first_width
    at = (b.to(tl.int64) * 9 * size + row % size)[:, None] + k.to(tl.int64)[None, :] * size
    tl.store(SHARES + at, total, mask=(row < rows)[:, None] & (k < 9)[None, :])


def _sizes(x, left: int) -> tuple[int, ...]:
    """Returns frames and columns of x, of h and of y, and left."""
    (frames, width), (first_frames, first_width) = x.shape[1:], ((n - 1) // 2 for n in x.shape[1:])
    if x.numel() + 2**20 >= 2**31:
        raise ValueError(
            f"fastasr.conv_subsampling: x: expected fewer than 2**31 pixels on CUDA, got {x.numel()}"
        )
    return frames, width, first_frames, first_width, (first_frames - 1) // 2, (first_width + left) // 2, left


def conv_subsampling_forward(
    x, weight, bias, depthwise_weight, depthwise_bias, mask, left: int
) -> torch.Tensor:
    """Returns y (B, T', F', C) of contiguous x (B, T, F), weights (C, 1, 3, 3) and biases (C,) or None, all of one
    dtype, and mask (B, H) or None.
    """
    sizes, channels = _sizes(x, left), weight.shape[0]
    y = x.new_empty(x.shape[0], *sizes[4:6], channels)
    if y.numel():
        tile, rows = tiles(x.dtype)["forward"], y.shape[:3].numel()
        grid = (cdiv(rows, tile["BLOCK_P"]) * cdiv(channels, tile["BLOCK_C"]),)
        launch(forward_kernel, grid,
            x, weight, bias, depthwise_weight, depthwise_bias, as_bytes(mask), y, *sizes, rows, channels,
            **tile,
        )  # fmt: skip
    return y


def conv_subsampling_backward(
    grad, x, weight, bias, depthwise_weight, mask, left: int, need_x: bool
) -> tuple[torch.Tensor, ...]:
    """Returns (dx, dweight, dbias, ddepthwise_weight, ddepthwise_bias); dx without elements if not needed, dbias even
    without a bias.
    """
    sizes, channels = _sizes(x, left), weight.shape[0]
    if not grad.numel():
        found = (torch.zeros_like(weight), weight.new_zeros(channels)) * 2
        return x.new_zeros(x.shape if need_x else 0), *found
    inputs = grad, x, weight, bias, depthwise_weight, as_bytes(mask)
    shapes = tiles(x.dtype)
    dx = _input_gradient(inputs, sizes, shapes["input_gradient"]) if need_x else x.new_empty(0)
    tile, rows = shapes["weight_gradient"], grad.shape[:3].numel()
    rows_per_part = max(LEAST_ROWS, cdiv(rows, MAX_PARTS))
    rows_per_part = cdiv(rows_per_part, tile["BLOCK_P"]) * tile["BLOCK_P"]
    parts = cdiv(rows, rows_per_part)
    table = torch.empty(4 * parts, 10, channels, dtype=torch.float32, device=x.device)
    launch(weight_gradient_kernel, (3 * parts * cdiv(channels, tile["BLOCK_C"]),),
        *inputs, table, *sizes, rows, rows_per_part, channels, **tile,
    )  # fmt: skip
    of_first = torch.empty_like(weight), weight.new_empty(channels)
    found = *of_first, torch.empty_like(depthwise_weight), weight.new_empty(channels)
    launch(add_kernel, (10 * cdiv(channels, BLOCK_SUM), 2),
        table, *found, parts, channels, BLOCK_P=4 * MAX_PARTS, BLOCK_C=BLOCK_SUM, num_warps=4,
    )  # fmt: skip
    return dx, *found


def _input_gradient(inputs, sizes, tile) -> torch.Tensor:
    x, weight = inputs[1:3]
    frames, columns = sizes[2:4]
    rows = len(x) * frames * columns
    shares = torch.empty(len(x), 9, frames * columns, dtype=torch.float32, device=x.device)
    launch(input_gradient_kernel, (cdiv(rows, tile["BLOCK_P"]),),
        *inputs, shares, *sizes, rows, weight.shape[0], **tile,
    )  # fmt: skip
    return torch.nn.functional.fold(shares, x.shape[1:], 3, stride=2).squeeze(1).to(x.dtype)
