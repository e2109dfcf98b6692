# SPDX-License-Identifier: Apache-2.0
"""Rules for the layers of the package openai-whisper (whisper/model.py), its decoder, and its linear layers."""

from fastasr.swap.forwards import openai_whisper as models
from fastasr.swap.rule import Known, Rule, Upstream, check_parts, unread_child
from fastasr.swap.rules.torch import linear_structure

_WHISPER = Known("openai-whisper 20250625")
_ATTENTION, _LINEAR = "da5968a1843c2522f57476ba", "b7e3380735fa53bc26833843"


def _block_structure(module: Upstream) -> str | None:
    cross = () if module.cross_attn is None else ("cross_attn", "cross_attn_ln")
    reason = check_parts(module, ("attn", "attn_ln", "mlp", "mlp_ln", *cross))
    reason = reason or unread_child(module, "attn", "MultiHeadAttention", {_ATTENTION})
    return reason or unread_child(module.mlp, "0", "Linear", {_LINEAR})


BLOCK = Rule(
    name="openai_whisper.block",
    class_name="ResidualAttentionBlock",
    forward=models.block,
    structure=_block_structure,
    kernels=("rel_attention", "linear_activation"),
    known={"c66cdac0f55d2599e30b1662": _WHISPER},
)


def _decoder_structure(module: Upstream) -> str | None:
    shapes = {"positional_embedding": module.positional_embedding.shape}
    return check_parts(module, ("token_embedding", "blocks", "ln"), shapes, buffers=("mask",))


DECODER = Rule(
    name="openai_whisper.decoder",
    class_name="TextDecoder",
    forward=models.decoder,
    structure=_decoder_structure,
    kernels=("linear",),
    known={"825b4deb15c2e6bb07140104": _WHISPER},
    shallow=True,
)

LINEAR = Rule(
    name="openai_whisper.linear",
    class_name="Linear",
    forward=models.linear,
    structure=linear_structure,
    kernels=("linear",),
    known={_LINEAR: _WHISPER},
    companion=True,
)

RULES = (BLOCK, DECODER, LINEAR)
