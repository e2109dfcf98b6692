# SPDX-License-Identifier: Apache-2.0
"""gated_depthwise_conv as the convolution modules of Zipformer-M call it: stacks 0 and 3, plain and chunk-causal.

The chunks are those of a model trained with 32 frames at 50 Hz. Upstream is its module's code between in_proj and
out_proj, without its balancers and whitening; the streaming case is one step with its cache.
"""

from functools import partial

import torch

from fastasr import ops
from fastasr.benchmarks.case import (
    BATCH,
    FORWARD,
    FRAMES,
    Case,
    costs,
    module,
    shaped,
    upstream_member,
    versions,
)
from fastasr.ops import swoosh


class Between(torch.nn.Module):
    """What upstream's convolution module computes between its projections."""

    def __init__(self, conv, **options):
        super().__init__()
        self.conv, self.options = conv, options

    def forward(self, h):
        x, s = h.chunk(2, dim=2)
        y = self.conv((x * torch.sigmoid(s)).permute(1, 2, 0), **self.options).permute(2, 0, 1)
        return swoosh.definition(y, "SwooshR")


def _upstream(chunk: int | None, h, *state):
    channels, _, taps = state[0].shape
    if chunk is None:
        conv = Between(torch.nn.Conv1d(channels, channels, taps, groups=channels, padding=taps // 2))
    else:
        conv = upstream_member("zipformer.modules.scaling.ChunkCausalDepthwiseConv1d")(channels, taps)
        conv = Between(conv, chunk_size=chunk)
    prefix = "conv." if chunk is None else "conv.chunkwise_conv."
    names = f"{prefix}weight", f"{prefix}bias", "conv.causal_conv.weight", "conv.causal_conv.bias"
    return module(conv.to(h), h, **dict(zip((*names, "conv.chunkwise_conv_scale"), state, strict=False)))


def _inputs(shape, taps: int, causal: bool, device: str, dtype: torch.dtype):
    randn = partial(torch.randn, device=device, dtype=dtype)
    frames, batch, channels = shape
    inputs = [1.5 * randn(frames, batch, 2 * channels), 0.3 * randn(channels, 1, taps), randn(channels)]
    if causal:
        inputs += [0.3 * randn(channels, 1, taps // 2 + 1), randn(channels), 0.3 * randn(2, channels, taps)]
    return inputs


def _costs(shape, taps: int, causal: bool):
    n = torch.Size(shape).numel()
    products = n * (taps + taps // 2 + 1 if causal else taps)
    # x, s; y. x, s, dy; dx, ds. z again, du, the taps' gradients
    return costs((3 * n, 2 * products), (5 * n, 6 * products))


def _case(shape, taps: int, chunk: int | None = None) -> Case:
    def make(device: str, dtype: torch.dtype):
        inputs = _inputs(shape, taps, chunk is not None, device, dtype)
        options = {} if chunk is None else {"chunk_size": chunk}
        upstream = {"upstream": lambda: _upstream(chunk, *inputs)}
        return versions(ops.gated_depthwise_conv, *inputs, options=options, others=upstream)

    note = f", {taps} taps" + (f", chunks of {chunk}" if chunk else "")
    return shaped("gated_depthwise_conv", shape, make, _costs(shape, taps, chunk is not None), note)


def _step_case(shape, taps: int) -> Case:
    def make(device: str, dtype: torch.dtype):
        inputs = _inputs(shape, taps, True, device, dtype)
        _, batch, channels = shape
        cache = torch.randn(batch, channels, taps // 2, device=device, dtype=dtype)

        def kept(result):
            y, new_cache = result
            cache.copy_(new_cache)
            return y

        options = {"cache": cache, "return_cache": True}
        return versions(ops.gated_depthwise_conv, *inputs, options=options, result=kept)

    note = f", {taps} taps, one streaming step"
    return shaped("gated_depthwise_conv", shape, make, _costs(shape, taps, True), note, passes=(FORWARD,))


CASES = (
    _case((796, 4, 192), 31),
    _case((796, 4, 192), 31, chunk=32),
    _case((100, 4, 512), 15),
    _case((100, 4, 512), 15, chunk=4),
    _step_case((16, 1, 192), 31),
)
# stacks 0 and 3, plain and chunk-causal
ON_DEVICE = (
    *(_case((FRAMES, BATCH, 192), 31, chunk) for chunk in (None, 32)),
    *(_case((188, BATCH, 512), 15, chunk) for chunk in (None, 4)),
)
