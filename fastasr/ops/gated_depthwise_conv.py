# SPDX-License-Identifier: Apache-2.0
r"""The core of a Conformer's convolution module (Gulati et al., 2020): gate, padding mask, depthwise convolution, SiLU;
and of Zipformer's (Yao et al., 2023), whose convolution may be chunk-causal, and whose activation is SwooshR.

For h = (x, s) of shape (T, B, 2C), u = x · gate(s), 0 at padding and outside the sequence, where gate is the logistic
function or SiLU; per channel, with P = K // 2 + delay frames of the past (delay = 0 and K odd in chunk-causal form):

    plain         z[t] = b + Σ_k w[k] u[t + k − P]
    chunk-causal  z[t] = b' + Σ_{j ≤ P} v[j] u[t + j − P] + scale[t mod S] (b + Σ_k w[k] u[t + k − P])

where the last sum is over the frames of t's chunk of S frames alone, and scale[p] = 1 + L[p] (p < K) + R[p − (S − K)]
(p ≥ S − K) for chunk_scale = (L, R). y = z, SiLU(z) or SwooshR(z). Upstream: ``ConvolutionModule`` in
``zipformer.modules.zipformer``, ``ChunkCausalDepthwiseConv1d`` in ``zipformer.modules.scaling``. Recordings may lie one
after the other in one sequence: a frame then sees u of its own recording alone, and chunks begin with each recording,
which is one chunk of its own length if it has fewer frames than S. Kernels read the boundaries where they lie.

With q = dy · act'(z), r = q · scale: du[t] = Σ_k w[k] r[t − k + P] (within chunks) + Σ_j v[j] q[t − j + P],
dx = du · gate(s), ds = du · x · gate'(s), and the weights' gradients are sums of q and r against u.
Only h is saved: backward recomputes u and z.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.ops import _swoosh
from fastasr.ops._depthwise_conv import ACTIVATIONS, GATES, check_delay, depthwise_conv
from fastasr.ops._dispatch import Kernels
from fastasr.ops._layout import dense_channels
from fastasr.ops._op import Arguments, Needs, Op, Saved, op
from fastasr.ops._register import cast
from fastasr.ops._runtime import COMPUTE, operand


# --------------------------------------------------------------------------- parts
def _check(op: Op, a: Arguments) -> None:
    needs = {"causal_weight": "chunk_scale", "chunk_scale": "causal_weight", "causal_bias": "causal_weight"}
    for name, partner in needs.items():
        if getattr(a, partner) is None and getattr(a, name) is not None:
            op.fail(name, f"it together with {partner}", f"no {partner}")
    if a.causal_weight is None and a.chunk_size != -1:
        op.fail("chunk_size", "it together with causal_weight", "no causal_weight")
    taps = a.weight.shape[-1]
    if a.causal_weight is not None and taps % 2 == 0:
        op.fail("weight", "an odd number of taps in chunk-causal form", taps)
    check_delay(op, taps, a.delay)
    if a.causal_weight is not None and a.delay:
        op.fail("delay", "0 in chunk-causal form", a.delay)
    if a.starts is not None and a.cache is not None:
        op.fail("cache", "None with starts", tuple(a.cache.shape))
    if a.starts is not None and a.return_cache:
        op.fail("return_cache", "False with starts", a.return_cache)


def _autocast(op: Op, dtype: torch.dtype, a: Arguments) -> Arguments:
    """Follows the convolution's rule, but the output is float32 where the scale is; the kernels widen a narrower h, and
    they read weights and biases unrounded."""
    if a.chunk_scale is not None:
        dtype = torch.promote_types(dtype, a.chunk_scale.dtype)
    h = a.h if torch.promote_types(a.h.dtype, dtype) is dtype else cast(dtype, a.h)[0]
    return a._replace(h=h)


def _fast(
    kernels: Kernels,
    keep: bool,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    causal_weight: Tensor | None,
    causal_bias: Tensor | None,
    chunk_scale: Tensor | None,
    padding_mask: Tensor | None,
    cache: Tensor | None,
    starts: Tensor | None,
    chunk_size: int,
    activation: str,
    return_cache: bool,
    delay: int,
    gate: str,
) -> tuple[Tensor, Tensor]:
    dense = h.is_contiguous() or h.stride(-1) == 1
    if (chunk_size != -1 and causal_weight is None) or weight.dtype not in COMPUTE or not dense:
        raise NotImplementedError
    return kernels.forward(
        h, weight, bias, causal_weight, causal_bias, chunk_scale, padding_mask, cache, starts, chunk_size,
        ACTIVATIONS[activation], return_cache, delay, GATES[gate],
    )  # fmt: skip


def _operands(kernels: Kernels, a: Arguments | Saved, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Returns the tensors as the kernels read them: those for CPUs take one dtype, and weights and biases in float32 or
    better."""
    work, wide = None, None
    if kernels.backend == "cpu":
        work, wide = dtype, torch.promote_types(dtype, torch.float32)
    return (
        operand(a.h, work, dense_channels),
        *(operand(t, wide) for t in (a.weight, a.bias, a.causal_weight, a.causal_bias)),
        operand(a.chunk_scale, work),
        operand(a.padding_mask, None),
        operand(a.cache, work),
        operand(a.starts, None),
    )


def _launch(op: Op, kernels: Kernels, a: Arguments, dtype: torch.dtype, keep: bool) -> tuple[Tensor, Tensor]:
    options = a.chunk_size, ACTIVATIONS[a.activation], a.return_cache, a.delay, GATES[a.gate]
    return kernels.forward(*_operands(kernels, a, dtype), *options)


def _gradients(
    op: Op, kernels: Kernels, grads: Sequence[Tensor], s: Saved, needs: Needs
) -> Sequence[Tensor | None]:
    dtype = op.written.result_dtypes(s)[0]
    found = kernels.backward(
        operand(grads[0], dtype if kernels.backend == "cpu" else None, dense_channels),
        *_operands(kernels, s, dtype),
        s.chunk_size,
        ACTIVATIONS[s.activation],
        s.delay,
        GATES[s.gate],
    )
    if s.return_cache:
        _add_gradients_of_cache(grads[1], found[0], found[-1], s)
    return found


def _add_gradients_of_cache(grad: Tensor, dh: Tensor, dcache: Tensor, saved: Saved) -> None:
    """Adds the gradients through the new cache, which is the last frames of (cache, u)."""
    frames, pad = saved.h.shape[0], grad.shape[2]
    taken = min(frames, pad)
    if saved.cache is not None and taken < pad:
        dcache[..., taken:] += grad[..., : pad - taken]
    if not taken:
        return
    x, s = saved.h[frames - taken :].chunk(2, dim=-1)
    du = grad[..., pad - taken :].permute(2, 0, 1)  # [taken, B, C]
    if saved.padding_mask is not None:
        du = du.masked_fill(saved.padding_mask[:, frames - taken :].t().unsqueeze(-1), 0.0)
    gate = torch.sigmoid(s)
    rest, factor = 1.0 - gate, gate
    if saved.gate == "silu":
        rest, factor = 1.0 + s * rest, s * gate
    dh[frames - taken :] += torch.cat([du * factor, du * x * gate * rest], dim=-1).to(dh.dtype)


def _recordings(starts: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Returns [begin, end) of the recording of each frame, both (T,)."""
    begun = starts <= torch.arange(frames, device=starts.device, dtype=torch.int64)[:, None]
    begin = torch.where(begun, starts, 0).amax(1).clamp(min=0)
    return begin, torch.where(begun, frames, starts).amin(1).clamp(max=frames)


def _spread(u: Tensor, first: Tensor, taps: int, most: int) -> tuple[Tensor, Tensor]:
    """Returns u (B, C, T) with taps − 1 zeros before each frame where ``first`` (T,) is True, which are at most
    ``most``, and the places (T,) of its frames there."""
    batch, channels, frames = u.shape
    places = torch.arange(frames, device=u.device, dtype=torch.int64) + first.cumsum(0) * (taps - 1)
    return u.new_zeros(batch, channels, frames + most * (taps - 1)).index_copy(2, places, u), places


def _within_chunks(
    u: Tensor, weight: Tensor, bias: Tensor | None, chunk_scale: Tensor, size: int, starts: Tensor | None
) -> Tensor:
    batch, channels, frames = u.shape
    taps = weight.shape[-1]
    reach = taps // 2, taps // 2
    size = max(1, frames) if size < 0 or size > frames else size
    if starts is not None:
        begin, end = _recordings(starts, frames)
        sizes = (end - begin).clamp(max=size)
        place = (torch.arange(frames, device=u.device, dtype=torch.int64) - begin) % sizes
        u, places = _spread(u, place == 0, taps, frames // size + len(starts) + 1)
        left, right = F.pad(chunk_scale, (0, 1)).unbind(0)  # tap K is that of frames away from the edge
        to_right = place - sizes + taps
        scale = left.index_select(1, place.clamp(max=taps))
        scale = scale + right.index_select(1, torch.where(to_right < 0, taps, to_right))
        return depthwise_conv(F.pad(u, reach), weight, bias).index_select(2, places) * (1.0 + scale)
    count = -(-frames // size)
    chunks = F.pad(u, (0, count * size - frames)).reshape(batch, channels, count, size).transpose(1, 2)
    chunks = F.pad(chunks.reshape(batch * count, channels, size), reach)
    z = depthwise_conv(chunks, weight, bias) * edge_scale(chunk_scale, size)
    z = z.reshape(batch, count, channels, size).transpose(1, 2)
    return z.reshape(batch, channels, count * size)[..., :frames]


def edge_scale(chunk_scale: Tensor, size: int) -> Tensor:
    """Returns (C, size): 1 plus the correction near the left edge plus that near the right edge of a chunk."""
    left, right = chunk_scale.unbind(0)
    more = size - left.shape[1]
    if more < 0:
        return 1.0 + (left[:, :size] + right[:, -size:])
    return 1.0 + (F.pad(left, (0, more)) + F.pad(right, (more, 0)))


_PARAMETERS = "weight bias causal_weight causal_bias chunk_scale"


# --------------------------------------------------------------------------- the op
@op(
    "cpu triton",
    autocast=_autocast,
    strides={"h": "channels", "grad": "channels"},
    check=_check,
    launch=_launch,
    backward=f"grad h {_PARAMETERS} padding_mask cache starts chunk_size activation delay gate",
    gradients=_gradients,
    fast=_fast,
)
def gated_depthwise_conv(
    h: Annotated[Tensor, "T B 2*C"],
    weight: Annotated[Tensor, "C 1 K | C K, K >= 1"],
    bias: Annotated[Tensor, "C"] | None = None,
    causal_weight: Annotated[Tensor, "C 1 K//2+1 | C K//2+1"] | None = None,
    causal_bias: Annotated[Tensor, "C"] | None = None,
    chunk_scale: Annotated[Tensor, "2 C K"] | None = None,
    *,
    padding_mask: Annotated[Tensor, "B T", bool] | None = None,
    cache: Annotated[Tensor, "B C K//2+delay"] | None = None,
    starts: Annotated[Tensor, "N, N >= 1", torch.int64] | None = None,
    chunk_size: Annotated[int, "-1 or >= 1"] = -1,
    activation: Annotated[Literal["swoosh_r", "silu", "identity"], ACTIVATIONS] = "swoosh_r",
    return_cache: bool = False,
    delay: int = 0,
    gate: Annotated[Literal["sigmoid", "silu"], GATES] = "sigmoid",
) -> (
    Annotated[Tensor, "T B C", "h + chunk_scale"]
    | tuple[
        Annotated[Tensor, "y: T B C", "h + chunk_scale"],
        Annotated[Tensor, "new_cache: B C K//2+delay", "h + cache"],
    ]
):
    """act of the depthwise convolution over time of x · gate(s), for h = (x, s); plain, or chunk-causal.

    Args:
        h: (T, B, 2C), both halves of a gated projection; float32, bfloat16, float16 or float64. Its channels are read
            where they lie if they are contiguous, whatever the other strides.
        weight: (C, 1, K) or (C, K): the taps of the plain convolution, padded with zeros to the same length; in
            chunk-causal form, where K is odd, those of the convolution within each chunk. Weights and biases may have
            another dtype than h: kernels read them unrounded, under autocast too.
        bias: (C,), of that convolution.
        causal_weight: (C, 1, (K + 1) / 2) or (C, (K + 1) / 2): the taps on this frame and those before it, whatever
            their chunk. Together with chunk_scale it selects the chunk-causal form.
        causal_bias: (C,).
        chunk_scale: (2, C, K): by how much the scale of the convolution within the chunk exceeds 1, by the distance
            from the chunk's first frame, and to its last.
        padding_mask: (B, T), bool; True where a frame is padding, which counts as 0.
        cache: (B, C, K // 2 + delay): x · gate(s) of the frames before the first; None: zeros.
        starts: int64 (N,), without caches: where recordings begin and end in every sequence. The convolution of a frame
            sees none beyond these bounds. Their order does not matter, and equal numbers are recordings without frames.
            On a GPU nothing waits for them.
        chunk_size: frames of a chunk; -1, or more than T: one chunk holds the whole sequence. With ``starts`` chunks
            count from the first frame of the recording, and a shorter recording is one chunk of its own length.
        activation: "swoosh_r", "silu" or "identity".
        return_cache: return (y, cache for the frames that follow).
        delay: plain form: the convolution sees K // 2 + delay frames of the past; (K − 1) // 2 makes it causal.
        gate: "sigmoid", or "silu": u = x · s · sigmoid(s).
    Returns:
        y (T, B, C), in the promotion of h's and chunk_scale's dtype, computed in float32 or better and rounded once. It
        is contiguous, or lies in h's order of memory. The new cache has the promotion of h's and the cache's dtype.
    Raises:
        TypeError: an argument is of the wrong type, or a tensor not floating (padding_mask: not bool).
        ValueError: shapes, dtypes or devices do not match; chunk_size is 0 or less than -1; a tap would not reach the
            frame itself because of delay; an argument of the chunk-causal form is given without the others; starts are
            given with a cache.
    """
    others = bias, causal_weight, causal_bias
    weight = weight.to(h.dtype)
    bias, causal_weight, causal_bias = (t if t is None else t.to(h.dtype) for t in others)
    x, s = h.chunk(2, dim=-1)
    u = (x * (torch.sigmoid(s) if gate == "sigmoid" else F.silu(s))).permute(1, 2, 0)  # [B, C, T]
    if padding_mask is not None:
        u = u.masked_fill(padding_mask.unsqueeze(1), 0.0)
    places, taps, alone = None, weight.shape[-1], u
    if starts is not None:
        begin, _ = _recordings(starts, len(h))
        frame = torch.arange(len(h), device=h.device, dtype=torch.int64)
        u, places = _spread(u, frame == begin, taps, len(starts) + 1)
    frames, past = u.shape[2], taps // 2 + delay
    context = F.pad(u, (past, 0)) if cache is None else torch.cat([cache, u], dim=2)
    new_cache = context[..., frames:]
    context = context.to(u.dtype)
    if causal_weight is None:
        z = depthwise_conv(F.pad(context, (0, taps - 1 - past)), weight, bias)
    else:
        z = depthwise_conv(context, causal_weight, causal_bias)
    z = z if places is None else z.index_select(2, places)
    if chunk_scale is not None:
        z = z + _within_chunks(alone, weight, bias, chunk_scale, chunk_size, starts)
    y = z.permute(2, 0, 1)  # [T, B, C]
    if activation == "swoosh_r":
        y = _swoosh.definition(y, "SwooshR")
    elif activation == "silu":
        y = F.silu(y)
    return (y, new_cache) if return_cache else y
