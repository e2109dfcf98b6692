# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the ops: one file per op, each with its table ``CASES``."""

from fastasr.benchmarks.case import Case
from fastasr.benchmarks.ops import (
    balancer_gradient,
    bias_norm,
    bypass,
    complex_ema_scan,
    conv_spatial_gate,
    depthwise_conv2d,
    depthwise_conv_residual,
    ema_scan,
    gated_depthwise_conv,
    layer_norm_lstm,
    linear,
    linear_activation,
    nonlin_attention,
    rel_attention,
    residual_norm,
    rnnt_joiner,
    rnnt_lattice,
    rnnt_pruned_lattice,
    segment_attention,
    swoosh,
    swoosh_linear,
    toeplitz_attention,
    zipformer_attention,
    zipformer_attention_weights,
)

MODULES = (
    swoosh,
    swoosh_linear,
    bias_norm,
    bypass,
    balancer_gradient,
    linear,
    linear_activation,
    layer_norm_lstm,
    ema_scan,
    complex_ema_scan,
    zipformer_attention_weights,
    zipformer_attention,
    rel_attention,
    nonlin_attention,
    toeplitz_attention,
    segment_attention,
    residual_norm,
    depthwise_conv2d,
    gated_depthwise_conv,
    conv_spatial_gate,
    depthwise_conv_residual,
    rnnt_joiner,
    rnnt_lattice,
    rnnt_pruned_lattice,
)


def cases() -> list[Case]:
    """Every case of every op."""
    return [case for module in MODULES for case in module.CASES]


def names() -> list[str]:
    """The ops that have cases, in table order."""
    return list(dict.fromkeys(case.op for case in cases()))
