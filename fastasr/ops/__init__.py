# SPDX-License-Identifier: Apache-2.0
"""The operations. Each file holds one: formula and source, eager definition, checks, registration, backends.

Every op is also registered as ``torch.ops.fastasr.<name>``; ``fastasr ops`` prints which backends serve it here.
"""

import pkgutil
import warnings
from importlib import import_module

from fastasr.ops import _dispatch
from fastasr.ops._op import OPS
from fastasr.ops.balancer_gradient import balancer_gradient
from fastasr.ops.bias_norm import bias_norm
from fastasr.ops.complex_ema_scan import complex_ema_scan
from fastasr.ops.conv_spatial_gate import conv_spatial_gate
from fastasr.ops.depthwise_conv2d import depthwise_conv2d
from fastasr.ops.depthwise_conv_residual import depthwise_conv_residual
from fastasr.ops.ema_scan import ema_scan
from fastasr.ops.linear import linear
from fastasr.ops.linear_activation import linear_activation
from fastasr.ops.nonlin_attention import nonlin_attention
from fastasr.ops.rel_attention import rel_attention
from fastasr.ops.zipformer_attention import zipformer_attention
from fastasr.ops.zipformer_attention_weights import zipformer_attention_weights
from fastasr.ops.residual_norm import gated_residual_norm, residual_norm
from fastasr.ops.rnnt_joiner import rnnt_joiner
from fastasr.ops.rnnt_lattice import rnnt_lattice
from fastasr.ops.rnnt_pruned_lattice import rnnt_pruned_lattice
from fastasr.ops.segment_attention import segment_attention
from fastasr.ops.swoosh_linear import swoosh_linear
from fastasr.ops.toeplitz_attention import toeplitz_attention

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        import_module(f"{__name__}.{_module.name}")
globals().update({name: op.function for name, op in OPS.items()})
_dispatch.prepare()  # registers torch.ops.fastasr_cpu.*; where that is missing it is reported, not raised

NAMES = (  # of the ops that are not declared yet
    "swoosh_linear",
    "bias_norm",
    "linear",
    "linear_activation",
    "ema_scan",
    "complex_ema_scan",
    "conv_spatial_gate",
    "depthwise_conv2d",
    "depthwise_conv_residual",
    "nonlin_attention",
    "rel_attention",
    "zipformer_attention",
    "zipformer_attention_weights",
    "gated_residual_norm",
    "residual_norm",
    "toeplitz_attention",
    "segment_attention",
    "rnnt_lattice",
    "rnnt_pruned_lattice",
    "balancer_gradient",
    "rnnt_joiner",
    *OPS,
)
GRADIENTS = ("balancer_gradient",)  # ops of backward passes: they have no gradient and tests of their own
__all__ = [
    "balancer_gradient",
    "bias_norm",
    "complex_ema_scan",
    "conv_spatial_gate",
    "depthwise_conv2d",
    "depthwise_conv_residual",
    "ema_scan",
    "gated_residual_norm",
    "linear",
    "linear_activation",
    "nonlin_attention",
    "rel_attention",
    "zipformer_attention",
    "zipformer_attention_weights",
    "residual_norm",
    "rnnt_joiner",
    "rnnt_lattice",
    "rnnt_pruned_lattice",
    "segment_attention",
    "swoosh_linear",
    "toeplitz_attention",
    *OPS,
]

_RENAMED = {  # names of the release before: they go with the next one
    "rel_position_attention": "zipformer_attention",
    "rel_position_attention_weights": "zipformer_attention_weights",
}


def __getattr__(name: str):
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"fastasr.ops.{name} is now fastasr.ops.{_RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return globals()[_RENAMED[name]]
