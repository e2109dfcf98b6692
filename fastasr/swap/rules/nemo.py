# SPDX-License-Identifier: Apache-2.0
"""Rules for NeMo's Conformer and FastConformer (nemo/collections/asr/parts/submodules)."""

import torch

from fastasr.swap.forwards import front_ends, layers
from fastasr.swap.forwards import nemo as models
from fastasr.swap.rule import Known, Rule, Upstream, check_parts, unread_child
from fastasr.swap.rules.conformer import (
    attention_rule,
    either_convolution_rule,
    feed_forward_rule,
    layer_rule,
)

_NEMO = Known("nemo_toolkit 2.5 to 3.0")
_CAUSAL_CONVOLUTION = {"46714ff84a8e88178d848c5c"}
_MASKED_CONVOLUTIONS = {"d97ea33fee420de6fe5562f1"}
_LINEARS = ("linear_q", "linear_k", "linear_v", "linear_out", "linear_pos")
_CONVOLUTIONS = ("pointwise_conv1", "depthwise_conv", "batch_norm", "activation", "pointwise_conv2")


def _activation(module: Upstream) -> str | None:
    cls = type(module.activation)
    if cls.__name__ == "Swish" and cls.forward is not torch.nn.SiLU.forward:
        return "submodule activation is a Swish that is not torch's SiLU"
    return None


def _attention_structure(module: Upstream) -> str | None:
    shapes = dict.fromkeys(("pos_bias_u", "pos_bias_v"), (module.h, module.d_k))
    return check_parts(module, (*_LINEARS, "dropout"), shapes)


def _local_attention_structure(module: Upstream) -> str | None:
    if module.global_tokens:
        return f"global_tokens is {module.global_tokens}, expected 0: they attend by another formula"
    left, right = module.att_context_size
    if left != right:
        return f"att_context_size is {[left, right]}, expected equal ones: else upstream shifts the positions"
    return _attention_structure(module)


def _convolution_structure(module: Upstream) -> str | None:
    if module.pointwise_activation != "glu_":
        return f"pointwise_activation is {module.pointwise_activation!r}, expected 'glu_'"
    reason = check_parts(module, _CONVOLUTIONS)
    reason = reason or unread_child(module, "depthwise_conv", "CausalConv1D", _CAUSAL_CONVOLUTION)
    return reason or _activation(module)


def _feed_forward_structure(module: Upstream) -> str | None:
    children = ("linear1", "activation", "dropout", "linear2")
    reason = check_parts(module, children)
    return reason or _activation(module)


def _kind(module: Upstream, expected: str) -> str | None:
    """Returns a reason unless the front end is of this kind, not causal, with its parts."""
    if module._subsampling != expected or module.is_causal:
        return f"computes {'causal ' * module.is_causal}{module._subsampling}, expected {expected}"
    return check_parts(module, ("conv", "out"))


def _subsampling_structure(module: Upstream) -> str | None:
    reason = _kind(module, "dw_striding")
    if reason is None and type(module.conv).__name__ != "MaskedConvSequential":
        return f"submodule conv is a {type(module.conv).__name__}, expected a MaskedConvSequential"
    expected = 2 + 3 * (module._sampling_num - 1)
    if reason is None and len(module.conv) != expected:
        return f"submodule conv has {len(module.conv)} layers, expected {expected}"
    return reason or unread_child(module, "conv", "MaskedConvSequential", _MASKED_CONVOLUTIONS)


def _striding_structure(module: Upstream) -> str | None:
    reason = _kind(module, "striding")
    return reason or unread_child(module, "conv", "MaskedConvSequential", _MASKED_CONVOLUTIONS)


ATTENTION = attention_rule(
    name="nemo.rel_position_attention",
    class_name="RelPositionMultiHeadAttention",
    forward=models.nemo_attention,
    structure=_attention_structure,
    known={"32d9e468b5129de771d4aa32": _NEMO},
    note="in training the kernel draws the weights' dropout itself, see upstream_draws",
)

LOCAL_ATTENTION = attention_rule(
    name="nemo.local_attention",
    class_name="RelPositionMultiHeadAttentionLongformer",
    forward=models.nemo_local_attention,
    structure=_local_attention_structure,
    known={"a7c824605ce71afc8cd100e0": Known("nemo_toolkit 3.0")},
    note="in training the kernel draws the weights' dropout itself, see upstream_draws",
)

CONVOLUTION = either_convolution_rule(
    name="nemo.conformer_convolution",
    class_name="ConformerConvolution",
    forward=models.nemo_convolution,
    structure=_convolution_structure,
    known={"8718311024358c647d33a7e1": _NEMO},
)

FEED_FORWARD = feed_forward_rule(
    name="nemo.conformer_feed_forward",
    class_name="ConformerFeedForward",
    forward=models.nemo_feed_forward,
    structure=_feed_forward_structure,
    known={"9a04a861a080041baeba46f8": _NEMO},
)

SUBSAMPLING = Rule(
    name="nemo.conv_subsampling",
    class_name="ConvSubsampling",
    forward=models.nemo_subsampling,
    kernels=("conv_subsampling", "linear_activation", "linear"),
    structure=_subsampling_structure,
    known={"65fa60149e9b3bfa5527a8bd": _NEMO},
)

STRIDING = Rule(
    name="nemo.striding",
    class_name="ConvSubsampling",
    forward=front_ends.nemo_striding,
    kernels=("linear",),
    structure=_striding_structure,
    known={"65fa60149e9b3bfa5527a8bd": _NEMO},
    note="on a CPU its convolutions are matrix products",
)

LAYER = layer_rule(
    "nemo.conformer_layer",
    "ConformerLayer",
    layers.nemo_layer,
    {"c584ec63e0520d37c6553196": Known("nemo_toolkit 3.0")},
)

RULES = (ATTENTION, LOCAL_ATTENTION, CONVOLUTION, FEED_FORWARD, SUBSAMPLING, STRIDING, LAYER)
