# SPDX-License-Identifier: Apache-2.0
"""Rules for SpeechBrain's Conformer and Transformer (speechbrain/lobes/models/transformer)."""

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from fastasr.swap.forwards import speechbrain as models
from fastasr.swap.forwards import speechbrain_decoder, speechbrain_search, torch_attention
from fastasr.swap.rule import Known, Rule, Upstream, check_parts, check_sequence, holds, unread_child
from fastasr.swap.rules.conformer import attention_rule, feed_forward_rule, norm_convolution_rule

_SPEECHBRAIN = Known("speechbrain 1.1.2")
_SWISH = {"592b77330169aa9f5c793530"}


def _attention_structure(module: Upstream) -> str | None:
    heads, head, width = module.num_heads, module.head_dim, module.embed_dim
    if module.vhead_dim != head:
        return f"vhead_dim is {module.vhead_dim}, expected head_dim, {head}"
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("pos_bias_u", "pos_bias_v"), (head, heads))
    shapes |= {"in_proj_weight": (3 * width, width)}
    if module.vbias is not None:
        shapes["value_bias_weight"] = (width,)
    return check_parts(module, ("dropout_att", "out_proj", "linear_pos"), shapes)


def _convolution_structure(module: Upstream) -> str | None:
    reason = check_parts(module, ("layer_norm", "bottleneck", "conv", "after_conv"))
    reason = reason or check_sequence(module, "bottleneck", (nn.Conv1d, nn.GLU))
    reason = reason or check_sequence(module, "after_conv", (nn.LayerNorm, nn.Module, nn.Linear, nn.Dropout))
    if reason is None and module.bottleneck[1].dim != 1:
        return f"submodule bottleneck.1 gates dimension {module.bottleneck[1].dim}, expected 1"
    return reason or unread_child(module.after_conv, "1", "Swish", _SWISH)


def _feed_forward_structure(module: Upstream) -> str | None:
    reason = check_parts(module, ("ffn",))
    reason = reason or check_sequence(module, "ffn", (nn.Linear, nn.Module, nn.Dropout, nn.Linear))
    return reason or unread_child(module.ffn, "1", "Swish", _SWISH)


ATTENTION = attention_rule(
    name="speechbrain.rel_position_attention",
    class_name="RelPosMHAXL",
    forward=models.speechbrain_attention,
    structure=_attention_structure,
    known={"1cb23af43aa149e75afc1daa": _SPEECHBRAIN},
    shared=lambda result: result[0] if isinstance(result, tuple) else result,
    note="the weights are not returned; in training the kernel draws their dropout itself, see upstream_draws",
)

PLAIN_ATTENTION = replace(
    ATTENTION,
    name="speechbrain.attention",
    class_name="MultiheadAttention",
    forward=torch_attention.speechbrain_attention,
    structure=holds("att"),
    known={"7b79db780ac16915152a74ca": _SPEECHBRAIN},
)

CONVOLUTION = norm_convolution_rule(
    name="speechbrain.convolution",
    class_name="ConvolutionModule",
    forward=models.speechbrain_convolution,
    structure=_convolution_structure,
    known={"0ab2da6351ae5e2df2b10a5a": _SPEECHBRAIN},
)

FEED_FORWARD = feed_forward_rule(
    name="speechbrain.feed_forward",
    class_name="PositionalwiseFeedForward",
    forward=models.speechbrain_feed_forward,
    structure=_feed_forward_structure,
    known={"4d170277bea5bfc5641e7f74": _SPEECHBRAIN},
)


def _decoder_code(module: Upstream) -> list[Callable]:
    layer = module.layers[0]
    return [type(part).forward for part in (module, layer, layer.self_attn)]


def _decoder_structure(module: Upstream) -> str | None:
    reason = check_parts(module, ("layers", "norm"))
    kinds = {
        type(part).__name__ for layer in module.layers for part in (layer.self_attn, layer.multihead_attn)
    }
    return reason or (
        None if kinds == {"MultiheadAttention"} else f"its attention is {', '.join(sorted(kinds))}"
    )


DECODER = Rule(
    name="speechbrain.decoder",
    class_name="TransformerDecoder",
    forward=speechbrain_decoder.decoder,
    structure=_decoder_structure,
    kernels=("linear",),
    functions=_decoder_code,
    known={"490c0e05f2686e0d3422a9af": _SPEECHBRAIN},
    shallow=True,
    note="in a search on a CPU each step computes its own tokens alone, else upstream's code",
)

SEARCH = Rule(
    name="speechbrain.beam_search",
    class_name="S2STransformerBeamSearcher",
    forward=speechbrain_search.search,
    structure=lambda module: None,
    functions=lambda module: [type(module).forward, type(module).forward_step],
    known={"eee247a953972dab7d86d2ee": _SPEECHBRAIN},
    shallow=True,
    note="upstream's search; its decoder and language model compute the last tokens alone",
)


def _language_model_code(module: Upstream) -> list[Callable]:
    layer = module.encoder.layers[0]
    return [type(part).forward for part in (module, module.encoder, layer, layer.self_att)]


def _language_model_structure(module: Upstream) -> str | None:
    if not module.num_encoder_layers or module.num_decoder_layers:
        return "has no encoder, or a decoder"
    kinds = {type(layer.self_att).__name__ for layer in module.encoder.layers}
    return None if kinds == {"MultiheadAttention"} else f"its attention is {', '.join(sorted(kinds))}"


LANGUAGE_MODEL = Rule(
    name="speechbrain.language_model",
    class_name="TransformerLM",
    forward=speechbrain_search.language_model,
    structure=_language_model_structure,
    functions=_language_model_code,
    known={"64e22cd77cd1d2d4916f29ca": _SPEECHBRAIN},
    shallow=True,
    note="in a swapped search on a CPU each step computes its own tokens alone, else upstream's code",
)

RULES = (
    SEARCH,
    SEARCH.like(
        "speechbrain.greedy_search",
        "S2STransformerGreedySearcher",
        {"0b1b64bab4e997d6ee53ef28": _SPEECHBRAIN},
    ),
    LANGUAGE_MODEL,
    ATTENTION,
    PLAIN_ATTENTION,
    CONVOLUTION,
    FEED_FORWARD,
    DECODER,
)
