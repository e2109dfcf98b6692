# SPDX-License-Identifier: Apache-2.0
"""E-Branchformer, one file per concept. Kim et al., "E-Branchformer: Branchformer with enhanced merging for speech
recognition", SLT 2022, https://arxiv.org/abs/2210.00077. Attributes have ESPnet's names; RETURNN's models can be
converted."""

from fastasr.models.e_branchformer.attention import RelPositionMultiHeadedAttention
from fastasr.models.e_branchformer.cgmlp import ConvolutionalSpatialGatingUnit, FeedForwardConvGated
from fastasr.models.e_branchformer.encoder import EBranchformerEncoder
from fastasr.models.e_branchformer.feed_forward import PositionwiseFeedForward
from fastasr.models.e_branchformer.layer import EBranchformerLayer
from fastasr.models.e_branchformer.merge import Merge
from fastasr.models.e_branchformer.positional_encoding import RelPositionalEncoding
from fastasr.models.e_branchformer.returnn import from_returnn, to_returnn

__all__ = [
    "ConvolutionalSpatialGatingUnit",
    "EBranchformerEncoder",
    "EBranchformerLayer",
    "FeedForwardConvGated",
    "Merge",
    "PositionwiseFeedForward",
    "RelPositionMultiHeadedAttention",
    "RelPositionalEncoding",
    "from_returnn",
    "to_returnn",
]
