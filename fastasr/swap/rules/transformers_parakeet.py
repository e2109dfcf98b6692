# SPDX-License-Identifier: Apache-2.0
"""Rules for transformers' Parakeet encoder (transformers/models/parakeet/modeling_parakeet.py), which Parakeet's CTC,
RNN-T and TDT models, Canary and Cohere ASR share."""

import sys
from typing import Any

import torch
from torch import Tensor

from fastasr._recording import on_host
from fastasr.graphs.module import OnRow
from fastasr.graphs.recording import Unrecordable
from fastasr.models import fast_conformer as models
from fastasr.models.common.plain import COLLECTING
from fastasr.models.common.row import Capacity, RowCall
from fastasr.models.fast_conformer import positions, ragged, row
from fastasr.models.fast_conformer.encoder import padded
from fastasr.packed_frames import PackedFrames
from fastasr.swap.rule import (
    Graphed,
    Known,
    Ragged,
    Rule,
    Upstream,
    check_parts,
    holds,
    own_forward,
    unread_code,
    upstream_class,
)
from fastasr.swap.rules.conformer import attention_rule, convolution_rule, feed_forward_rule

_FROM_5_6 = Known("transformers 5.6 to 5.24")
CAPTURING = (COLLECTING,)
# The activations that fastasr's forwards do not call, and their known code
ACTIVATIONS = ("GELUActivation", "SiLUActivation"), {"1903e0da4ab1fe14975183ec", "bbb3a89cc2c8993670072487"}
_BLOCK = "c6cc6c4c6c123d55235c5852"
_CONVOLUTIONS = ("pointwise_conv1", "depthwise_conv", "norm", "activation", "pointwise_conv2")
_NORMS = ("norm_feed_forward1", "norm_self_att", "norm_conv", "norm_feed_forward2", "norm_out")

feed_forward_structure = holds("linear1", "activation", "linear2", activation=ACTIVATIONS)
convolution_structure = holds(*_CONVOLUTIONS, activation=ACTIVATIONS)
encoder_structure = holds("subsampling", "encode_positions", "layers")


def _before_5_18(module: Upstream) -> str | None:
    return "transformers 5.6 to 5.17 hides keys by -inf: queries of padding give 0 or NaN; expected 5.18 or newer"


def attention_structure(module: Upstream) -> str | None:
    if module.num_key_value_groups != 1:
        return f"num_key_value_groups is {module.num_key_value_groups}, expected 1"
    biases = dict.fromkeys(("bias_u", "bias_v"), (module.config.num_attention_heads, module.head_dim))
    return check_parts(module, ("q_proj", "k_proj", "v_proj", "o_proj", "relative_k_proj"), biases)


def _subsampling_structure(module: Upstream) -> str | None:
    count = 2 + 3 * (module.num_layers - 1)
    if len(module.layers) != count:
        return f"has {len(module.layers)} layers, expected {count}"
    return check_parts(module, ("layers", "linear"))


def positions_structure(module: Upstream) -> str | None:
    return check_parts(module, (), buffers=("inv_freq",))


def encoder(
    self: Upstream,
    input_features: Tensor,
    attention_mask: Tensor | None = None,
    output_attention_mask: bool = True,
    **kwargs: Any,
) -> Any:
    """Calls upstream's forward, and drops a mask that hides nothing: upstream would make a mask of all pairs of frames,
    2 GB for an hour."""
    upstream = upstream_class(self).forward
    idle = (
        type(attention_mask) is torch.Tensor
        and on_host(attention_mask)  # reading the mask would wait for another device
        and attention_mask.shape == input_features.shape[:2]
        and kwargs.get("return_dict", self.config.return_dict) is not False
        and bool((attention_mask == 1).all())
    )
    if not idle:
        return upstream(self, input_features, attention_mask, output_attention_mask, **kwargs)
    result = upstream(self, input_features, None, output_attention_mask, **kwargs)
    if not output_attention_mask:
        return result
    hidden = result.last_hidden_state
    mask = torch.ones(hidden.shape[:2], dtype=torch.int32, device=hidden.device)
    found = type(result)(last_hidden_state=hidden, attention_mask=mask)
    for name in [name for name in result if name not in found]:  # Upstream captured these and puts them last.
        found[name] = result[name]
    return found


def ragged_encoder(
    self: Upstream,
    input_features: Tensor | PackedFrames,
    attention_mask: Tensor | None = None,
    output_attention_mask: bool = True,
    **kwargs: Any,
) -> Any:
    """Does the same without computing anything for padding, unless outputs of every layer are asked for. The hidden
    states of PackedFrames (N₀, mel_bins) are PackedFrames (N, width)."""
    reason = _asked(self, kwargs)
    if isinstance(input_features, PackedFrames):

        def encode(batch: Tensor, mask: Tensor) -> Tensor:
            return ragged_encoder(self, batch, mask, False).last_hidden_state

        return _output(self, ragged.of_packed(self, input_features, attention_mask, encode, reason), None)
    lengths = ragged.lengths(self, input_features, attention_mask, reason)
    if lengths is None:
        return encoder(self, input_features, attention_mask, output_attention_mask, **kwargs)
    hidden = ragged.encoded(self, input_features, lengths)
    return _output(self, hidden, attention_mask if output_attention_mask else None)


def _output(self: Upstream, hidden: Tensor | PackedFrames, attention_mask: Tensor | None) -> Any:
    """Returns upstream's output, with the mask of hidden states for that of the features, if given."""
    if isinstance(hidden, Tensor) and attention_mask is not None:
        attention_mask = self._get_output_attention_mask(attention_mask, target_length=hidden.shape[1]).int()
    output = sys.modules[upstream_class(self).__module__].ParakeetEncoderModelOutput
    return output(last_hidden_state=hidden, attention_mask=attention_mask)


def _packed(
    self: Upstream,
    capacity: Capacity,
    input_features: Tensor | PackedFrames,
    attention_mask: Tensor | None = None,
    output_attention_mask: bool = True,
    **kwargs: Any,
) -> RowCall | str:
    """Returns the call on a row of frames for a call of the encoder, or why there is none."""
    wanted = attention_mask if output_attention_mask else None
    return _asked(self, kwargs) or row.packed(
        self, capacity, input_features, attention_mask, lambda hidden: _output(self, hidden, wanted)
    )


def recorded_encoder(
    self: Upstream,
    input_features: Tensor,
    attention_mask: Tensor | None = None,
    output_attention_mask: bool = True,
    **kwargs: Any,
) -> Any:
    """Does the same with one mask of valid frames for all blocks, because a recorded call may read no value."""
    reason = _asked(self, kwargs)
    if reason is not None:
        raise Unrecordable(reason)
    hidden, mask = padded(self, input_features, attention_mask)
    output = sys.modules[upstream_class(self).__module__].ParakeetEncoderModelOutput
    return output(
        last_hidden_state=hidden,
        attention_mask=mask.int() if mask is not None and output_attention_mask else None,
    )


def _asked(self: Upstream, kwargs: dict[str, Any]) -> str | None:
    """Returns the reason why only upstream's forward returns the outputs that a call asks for, or None."""
    asked = [
        name
        for name in ("output_hidden_states", "output_attentions")
        if kwargs.get(name, getattr(self.config, name, False))
    ]
    if kwargs.get("return_dict", self.config.return_dict) is False:
        asked.append("return_dict=False")
    return f"the call asks for {', '.join(asked)}" if asked else None


def _ragged_obstacle(module: Upstream) -> str | None:
    for i, layer in enumerate(module.layers):
        reason = unread_code(f"layers.{i}", layer, own_forward, {_BLOCK})
        if reason is not None:
            return reason
    return ragged.why_not(module)


def _row_obstacle(module: Upstream) -> str | None:
    return _ragged_obstacle(module) or row.why_not(module)


ATTENTION = attention_rule(
    name="transformers.parakeet_attention",
    class_name="ParakeetEncoderAttention",
    forward=models.FastConformerAttention.forward,
    structure=attention_structure,
    known={
        "d65758d3fe674a56e13408c2": Known("transformers 5.24"),
        "008a9cc97b05d9f6b47b2309": Known("transformers 5.18 to 5.23"),
        "625f1f5f4e1805e6f4c28619": Known("transformers 5.6 to 5.17", condition=_before_5_18),
    },
    shared=lambda result: result[0],  # not the weights, which the eager implementation returns
    hooks=CAPTURING,
    note="whatever the attention implementation; the weights are not returned; in training the kernel draws their "
    "dropout itself, see upstream_draws",
)

CONVOLUTION = convolution_rule(
    name="transformers.parakeet_convolution",
    class_name="ParakeetEncoderConvolutionModule",
    forward=models.FastConformerConvolution.forward,
    structure=convolution_structure,
    known={"9a392b8a0f44c543026efdf7": _FROM_5_6},
)

FEED_FORWARD = feed_forward_rule(
    name="transformers.parakeet_feed_forward",
    class_name="ParakeetEncoderFeedForward",
    forward=models.FastConformerFeedForward.forward,
    structure=feed_forward_structure,
    known={"676056f9fa94c63e8bea9766": _FROM_5_6},
)

BLOCK = Rule(
    name="transformers.parakeet_block",
    class_name="ParakeetEncoderBlock",
    forward=models.FastConformerBlock.forward,
    kernels=("add_norm", "add_two_norms"),
    structure=holds("feed_forward1", "self_attn", "conv", "feed_forward2", *_NORMS),
    known={_BLOCK: _FROM_5_6},
    shallow=True,
    companion=True,
    hooks=CAPTURING,
)

SUBSAMPLING = Rule(
    name="transformers.parakeet_subsampling",
    class_name="ParakeetEncoderSubsamplingConv2D",
    forward=models.FastConformerSubsampling.forward,
    kernels=("conv_subsampling", "linear_activation", "linear"),
    structure=_subsampling_structure,
    known={"351a84f7dc7d7ed4cfb8044e": _FROM_5_6},
)

POSITIONS = Rule(
    name="transformers.parakeet_positions",
    class_name="ParakeetEncoderRelPositionalEncoding",
    forward=models.FastConformerPositions.forward,
    structure=positions_structure,
    known={
        "ea04964dfece092a27cc8256": Known("transformers 5.24"),
        "0c61bad53ae76a9166f94487": Known("transformers 5.19 to 5.23"),
        "e9298577c4c8d93416f99812": Known("transformers 5.18"),
        "d5a3f1249fd909100d375303": Known("transformers 5.10 to 5.17"),
    },
    release=positions.release,
)

ENCODER = Rule(
    name="transformers.parakeet_encoder",
    class_name="ParakeetEncoder",
    forward=encoder,
    structure=encoder_structure,
    known={
        "5ffbcd81ffef3ae7089eada1": Known("transformers 5.23 and 5.24"),
        # draws a number for every layer in training even with layerdrop 0, which ragged_encoder does not
        "83a246a4e378a5b1f70454f8": Known("transformers 5.17 to 5.22"),
    },
    shallow=True,
    companion=True,
    ragged=Ragged(ragged_encoder, _ragged_obstacle),
    graphs=Graphed(
        recorded_encoder,
        _ragged_obstacle,
        parts=lambda encoder: list(encoder.layers),
        on_row=OnRow(row.encoded, _packed, _row_obstacle),
    ),
)

RULES = (ATTENTION, CONVOLUTION, FEED_FORWARD, BLOCK, SUBSAMPLING, POSITIONS, ENCODER)
