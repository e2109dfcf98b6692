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
    PASSES,
    Case,
    Cost,
    Implementation,
    compiled,
    costs_of,
    parameters,
    simple,
    upstream_module,
)
from fastasr.ops import swoosh

definition = ops.gated_depthwise_conv.definition


def _upstream(chunk: int, h, weight, bias, causal_weight=None, causal_bias=None, chunk_scale=None):
    channels, _, taps = weight.shape
    if causal_weight is None:
        conv = torch.nn.Conv1d(channels, channels, taps, groups=channels, padding=taps // 2).to(h)
        named = {"weight": weight, "bias": bias}
    else:
        conv = upstream_module("scaling.ChunkCausalDepthwiseConv1d")(channels, taps).to(h)
        named = {
            "chunkwise_conv.weight": weight,
            "chunkwise_conv.bias": bias,
            "causal_conv.weight": causal_weight,
            "causal_conv.bias": causal_bias,
            "chunkwise_conv_scale": chunk_scale,
        }
    conv.load_state_dict({name: value.detach() for name, value in named.items()})
    run = conv if causal_weight is None else partial(conv, chunk_size=chunk)

    def call():
        x, s = h.chunk(2, dim=2)
        y = run((x * torch.sigmoid(s)).permute(1, 2, 0)).permute(2, 0, 1)
        return swoosh.definition(y, "SwooshR")

    return Implementation(call, parameters(h, *conv.parameters()))


def _make(shape, taps: int, chunk: int | None, device: str, dtype: torch.dtype):
    make = partial(torch.randn, device=device, dtype=dtype)
    frames, batch, channels = shape
    h, options = 1.5 * make(frames, batch, 2 * channels), {}
    inputs = [h, 0.3 * make(channels, 1, taps), make(channels)]
    if chunk is not None:
        inputs += [0.3 * make(channels, 1, taps // 2 + 1), make(channels), 0.3 * make(2, channels, taps)]
        options["chunk_size"] = chunk
    return {
        "eager": lambda: simple(partial(definition, **options), *inputs),
        "compile": lambda: simple(compiled(partial(definition, **options)), *inputs),
        "upstream": lambda: _upstream(chunk, *inputs),
        "fastasr": lambda: simple(partial(ops.gated_depthwise_conv, **options), *inputs),
    }


def _make_step(shape, taps: int, device: str, dtype: torch.dtype):
    make = partial(torch.randn, device=device, dtype=dtype)
    frames, batch, channels = shape
    inputs = [1.5 * make(frames, batch, 2 * channels), 0.3 * make(channels, 1, taps), make(channels)]
    inputs += [0.3 * make(channels, 1, taps // 2 + 1), make(channels), 0.3 * make(2, channels, taps)]
    cache = make(batch, channels, taps // 2)

    def step(function):
        def call(*tensors):
            y, new_cache = function(*tensors, cache=cache, return_cache=True)
            cache.copy_(new_cache)
            return y

        return call

    return {
        "eager": lambda: simple(step(definition), *inputs),
        "compile": lambda: simple(step(compiled(definition)), *inputs),
        "fastasr": lambda: simple(step(ops.gated_depthwise_conv), *inputs),
    }


def _costs(shape, taps: int, chunk: int | None, size: int) -> dict[str, Cost]:
    elements = torch.Size(shape).numel()
    products = elements * (taps if chunk is None else taps + taps // 2 + 1)
    return costs_of(
        Cost(3 * elements * size, 2 * products),  # x, s; y
        Cost(5 * elements * size, 6 * products),  # x, s, dy; dx, ds. z again, du, the taps' gradients
    )


def _case(shape, taps: int, chunk: int | None = None) -> Case:
    name = "x".join(map(str, shape)) + f", {taps} taps" + (f", chunks of {chunk}" if chunk else "")
    costs = partial(_costs, shape, taps, chunk)
    return Case("gated_depthwise_conv", name, name, partial(_make, shape, taps, chunk), costs, passes=PASSES)


def _step_case(shape, taps: int) -> Case:
    name = "x".join(map(str, shape)) + f", {taps} taps, one streaming step"
    costs = partial(_costs, shape, taps, -1)
    return Case(
        "gated_depthwise_conv", name, name, partial(_make_step, shape, taps), costs, passes=(FORWARD,)
    )


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
