# SPDX-License-Identifier: Apache-2.0
"""The operations. Every module here without an underscore declares one op, or several that share their kernels; from
the declaration `make ops` writes the public function, which the module of its name in ``_written`` holds.

Every op is also registered as ``torch.ops.fastasr.<name>``; ``fastasr ops`` prints which backends serve it here.
"""

from typing import NoReturn

from fastasr._nearest import no_attribute as _no_attribute
from fastasr.ops import _dispatch
from fastasr.ops._op import OPS
from fastasr.ops._wrapped.complex_ema_scan import complex_ema_scan as complex_ema_scan
from fastasr.ops._wrapped.linear import linear as linear
from fastasr.ops._wrapped.swoosh_linear import swoosh_linear as swoosh_linear

# written by `make ops`: begin
from fastasr.ops._written.add_norm import add_norm as add_norm
from fastasr.ops._written.add_two_norms import add_two_norms as add_two_norms
from fastasr.ops._written.balancer_gradient import balancer_gradient as balancer_gradient
from fastasr.ops._written.batch_norm_activation import batch_norm_activation as batch_norm_activation
from fastasr.ops._written.bias_norm import bias_norm as bias_norm
from fastasr.ops._written.bypass import bypass as bypass
from fastasr.ops._written.clamped_linear import clamped_linear as clamped_linear
from fastasr.ops._written.conv_spatial_gate import conv_spatial_gate as conv_spatial_gate
from fastasr.ops._written.conv_subsampling import conv_subsampling as conv_subsampling
from fastasr.ops._written.depthwise_conv2d import depthwise_conv2d as depthwise_conv2d
from fastasr.ops._written.depthwise_conv_residual import depthwise_conv_residual as depthwise_conv_residual
from fastasr.ops._written.ema_scan import ema_scan as ema_scan
from fastasr.ops._written.gated_depthwise_conv import gated_depthwise_conv as gated_depthwise_conv
from fastasr.ops._written.gated_residual_norm import gated_residual_norm as gated_residual_norm
from fastasr.ops._written.layer_norm_lstm import layer_norm_lstm as layer_norm_lstm
from fastasr.ops._written.linear_activation import linear_activation as linear_activation
from fastasr.ops._written.nonlin_attention import nonlin_attention as nonlin_attention
from fastasr.ops._written.norm_activation import norm_activation as norm_activation
from fastasr.ops._written.rel_attention import rel_attention as rel_attention
from fastasr.ops._written.residual_norm import residual_norm as residual_norm
from fastasr.ops._written.rnnt_joiner import rnnt_joiner as rnnt_joiner
from fastasr.ops._written.rnnt_lattice import rnnt_lattice as rnnt_lattice
from fastasr.ops._written.rnnt_pruned_lattice import rnnt_pruned_lattice as rnnt_pruned_lattice
from fastasr.ops._written.segment_attention import segment_attention as segment_attention
from fastasr.ops._written.swoosh_l import swoosh_l as swoosh_l
from fastasr.ops._written.swoosh_r import swoosh_r as swoosh_r
from fastasr.ops._written.tdt_joiner import tdt_joiner as tdt_joiner
from fastasr.ops._written.tdt_lattice import tdt_lattice as tdt_lattice
from fastasr.ops._written.toeplitz_attention import toeplitz_attention as toeplitz_attention
from fastasr.ops._written.whitening_gradient import whitening_gradient as whitening_gradient
from fastasr.ops._written.zipformer_attention import zipformer_attention as zipformer_attention
from fastasr.ops._written.zipformer_attention_weights import (
    zipformer_attention_weights as zipformer_attention_weights,
)

# written by `make ops`: end

# This registers torch.ops.fastasr_cpu.*. If the library is missing, the table of ops says so and nothing raises.
_dispatch.prepare()

NAMES = tuple(sorted(OPS))
# These ops compute gradients in another function's backward: they have no gradient themselves.
GRADIENTS = tuple(name for name, op in OPS.items() if not op.written.differentiable)
__all__ = list(NAMES)


def __getattr__(name: str) -> NoReturn:
    raise _no_attribute(__name__, name, __all__)


def __dir__() -> list[str]:
    return __all__
