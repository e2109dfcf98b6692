# SPDX-License-Identifier: Apache-2.0
"""Rules for ESPnet: the MEGA decoder of its transducers (espnet2/asr_transducer/decoder).

Swapped instances have no attribute ``phantom_first_step``, so they stream as ESPnet does, from a key and a value of
zero.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from fastasr.models import mega as models
from fastasr.models.mega import decoding
from fastasr.swap.rule import (
    Known,
    Rule,
    Upstream,
    check_children,
    check_ints,
    check_parameters,
    check_parts,
    holds,
    own_forward,
    unread_child,
    unread_code,
    upstream_class,
)
from fastasr.swap.rules.conformer import DROPS

_ESPNET = Known("espnet 202511")

# in activation.py; it calls the function that its constructor chose
_SWISH = "Swish", {"bb9057b4092aa516672c4ebc"}


def _activation(module: Upstream) -> str | None:
    return unread_child(module, "activation", *_SWISH)


def _linear_shapes(module: Upstream, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Returns a reason if a child that is a plain linear layer does not have ``shapes`` (name -> (in, out))."""
    for name, (inputs, outputs) in shapes.items():
        linear = getattr(module, name)
        if type(linear) is torch.nn.Linear and tuple(linear.weight.shape) != (outputs, inputs):
            return f"{name}.weight has shape {tuple(linear.weight.shape)}, expected {(outputs, inputs)}"
    return None


def _ema_structure(module: Upstream) -> str | None:
    projection = module._parameters.get("kernel_projection_matrix")
    if projection is None or projection.ndim != 2:
        return "lacks a two-dimensional kernel_projection_matrix"
    size, heads = projection.shape
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("damping_factor", "decay_factor", "ema_expansion_matrix"), (size, heads, 1)
    )
    shapes |= {"kernel_projection_matrix": (size, heads), "residual_weight": (size,)}
    reason = check_parts(module, ("activation",), shapes) or _activation(module)
    if reason is None and abs(module.scaling - heads**-0.5) > 1e-12:
        reason = f"scaling is {module.scaling}, expected 1 / sqrt({heads})"
    truncation = module.truncation_length
    if reason is None and not (truncation is None or (isinstance(truncation, int) and truncation > 0)):
        reason = f"truncation_length is {truncation!r}, expected None or a positive int"
    return reason


def _simple_bias_structure(module: Upstream) -> str | None:
    return check_parameters(
        module, {"relative_position_bias": (2 * module.max_positions - 1,)}
    ) or check_children(module, {})


def _rotary_bias_structure(module: Upstream) -> str | None:
    shapes = dict.fromkeys(("alpha", "beta"), (1, module.size))
    reason = check_parameters(module, shapes, allowed_buffers=("_pe",)) or check_children(module, {})
    return reason or (f"size is {module.size}, expected an even number" if module.size % 2 else None)


_FEED_FORWARD = ("linear1", "linear2", "normalization", "activation", "dropout", "hidden_dropout")
_MEGA_CHILDREN = (
    *("multihead_damped_ema", "rel_pos_bias", "proj_v", "proj_mx", "proj_h"),
    *("activation", "normalization", "dropout", "dropout_attn", "dropout_ema"),
)


def _mega_structure(module: Upstream) -> str | None:
    shapes = dict.fromkeys(("qk_weight", "qk_bias"), (2, module.qk_size))
    reason = check_parts(module, _MEGA_CHILDREN, shapes)
    size, z, v = module.size, module.qk_size, module.v_size
    widths = {"proj_v": (size, v), "proj_mx": (size, z + v + 2 * size), "proj_h": (v, size)}
    reason = reason or _linear_shapes(module, widths) or _activation(module)
    if reason is None and abs(module.scaling - z**-0.5) > 1e-12:
        reason = f"scaling is {module.scaling}, expected 1 / sqrt({z})"
    return reason or check_ints(module, ("chunk_size",)) or _bias(module.rel_pos_bias)


def _bias(bias: Upstream) -> str | None:
    """Returns a reason against the bias, or None. Our forward reads the bias by offset."""
    for rule in (SIMPLE_BIAS, ROTARY_BIAS):
        if upstream_class(bias).__name__ == rule.class_name:
            reason = unread_code("rel_pos_bias", bias, own_forward, rule.known) or rule.structure(bias)
            return reason and f"submodule rel_pos_bias: {reason}"
    return f"submodule rel_pos_bias is a {type(bias).__name__}, expected one of ESPnet's two"


_DECODER_METHODS = ("inference", "score", "batch_score", "stack_qk_states")


def _decoder_functions(module: Upstream) -> list[Callable]:
    cls = upstream_class(module)
    return [getattr(cls, name) for name in ("forward", *_DECODER_METHODS, "create_batch_states")]


def _decoder_structure(module: Upstream) -> str | None:
    reason = check_parts(module, ("embed", "dropout_embed", "mega_blocks", "final_norm"))
    if reason:
        return reason
    blocks = module.mega_blocks
    if len(blocks) != module.num_blocks or any(len(block) != 2 for block in blocks):
        return f"mega_blocks does not hold {module.num_blocks} pairs (num_blocks)"
    if not isinstance(module.score_cache, dict):
        return f"score_cache is a {type(module.score_cache).__name__}, expected a dict"
    return check_ints(module, ("pad_idx", "chunk_size", "mega_att_k_size", "mega_att_v_size"))


def _in_one_dtype(result: Any) -> Any:
    """Returns a result with the averages of a stream in the dtype of its output, as upstream's are: in a half-precision
    model ours are float32."""
    dtype = tree_leaves(result)[0].dtype
    floats = lambda t: isinstance(t, torch.Tensor) and t.is_floating_point()  # noqa: E731
    return tree_map(lambda t: t.to(dtype) if floats(t) else t, result)


DAMPED_EMA = Rule(
    name="espnet.multi_head_damped_ema",
    class_name="MultiHeadDampedEMA",
    forward=models.MultiHeadDampedEMA.forward,
    kernels=("ema_scan",),
    structure=_ema_structure,
    known={"1bfbbaaa87a4d0d1020b26b0": _ESPNET},
    shared=_in_one_dtype,
    caches={"_coeffs": None, "_kernel": None},
    note="coefficients are computed at every call",
)

_BY_OFFSET = "makes the matrix from one value per offset"

SIMPLE_BIAS = Rule(
    name="espnet.relative_position_bias",
    class_name="RelativePositionBias",
    forward=models.RelativePositionBias.forward,
    structure=_simple_bias_structure,
    known={"87db028706b508b2d70920d2": _ESPNET},
    note=_BY_OFFSET,
)

ROTARY_BIAS = Rule(
    name="espnet.rotary_relative_position_bias",
    class_name="RotaryRelativePositionBias",
    forward=models.RotaryRelativePositionBias.forward,
    structure=_rotary_bias_structure,
    known={"04daf756cc39cbb6fa17ef09": _ESPNET},
    caches={"sine": None, "cosine": None},
    note=_BY_OFFSET,
)

MEGA = Rule(
    name="espnet.mega",
    class_name="MEGA",
    forward=models.MEGA.forward,
    kernels=("linear", "toeplitz_attention", "gated_residual_norm"),
    structure=_mega_structure,
    known={"95a64d782457ce05429107d5": _ESPNET},
    shared=_in_one_dtype,
)

FEED_FORWARD = Rule(
    name="espnet.normalized_positionwise_feed_forward",
    class_name="NormalizedPositionwiseFeedForward",
    forward=models.NormalizedPositionwiseFeedForward.forward,
    kernels=("linear", "residual_norm"),
    structure=holds(*_FEED_FORWARD, activation=_SWISH),
    known={"8c82b89c0bca5d0c6f04d6f5": _ESPNET},
    note=DROPS,
)

DECODER = Rule(
    name="espnet.mega_decoder",
    class_name="MEGADecoder",
    forward=models.MEGADecoder.forward,
    methods=tuple((name, vars(models.MEGADecoder)[name]) for name in _DECODER_METHODS),
    compared=("inference",),
    structure=_decoder_structure,
    functions=_decoder_functions,
    known={"5b3a37c8799d1e482afcec8b": _ESPNET},
    shared=_in_one_dtype,
    caches={"score_cache": {}},
    release=decoding.release,
    leaves=lambda module: {"inference": decoding.why_not_yet(module)},
    note="score remembers the last 128 hypotheses of one utterance; states are stacked on their device",
)

RULES = (DECODER, MEGA, DAMPED_EMA, FEED_FORWARD, SIMPLE_BIAS, ROTARY_BIAS)
