# SPDX-License-Identifier: Apache-2.0
"""Rules for transformers' Nemotron streaming encoder
(transformers/models/nemotron_asr_streaming/modeling_nemotron_asr_streaming.py), whole recordings and chunks."""

import sys
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from fastasr import _left
from fastasr.graphs.module import of
from fastasr.models.fast_conformer import (
    FastConformerFeedForward,
    attention,
    nemotron,
    positions,
    stream_state,
)
from fastasr.swap import binding
from fastasr.swap.rule import Graphed, Known, Rule, Upstream, check_parts, unread_child, upstream_class
from fastasr.swap.rules import transformers_parakeet as parakeet
from fastasr.swap.rules.conformer import DROPS

_CAUSAL_1D, _CAUSAL_2D = {"490bda47555e4ff32663f51b"}, {"729bfd53b68871a0ce46be64"}
_STAGE = {"5d3928cd5c0d992983fba885"}


def _attention_structure(module: Upstream) -> str | None:
    implementation = module.config._attn_implementation
    if implementation != "sdpa":
        return f"attention implementation is {implementation!r}, expected 'sdpa'; upstream's eager one inverts the mask"
    return parakeet.attention_structure(module)


def _upstream_child(
    module: Upstream, name: str, class_name: str, known: Collection[str], **sizes: Any
) -> str | None:
    """Returns a reason unless the submodule is upstream's and its convolution has these sizes, else None: our forward
    reads its weights and does not call it."""
    child, class_name = getattr(module, name), f"NemotronAsrStreamingEncoder{class_name}"
    if upstream_class(child).__name__ != class_name:
        return f"submodule {name} is a {type(child).__name__}, expected {class_name}"
    for attribute, size in sizes.items():
        if getattr(child, attribute) != size:
            return f"{attribute} of submodule {name} is {getattr(child, attribute)}, expected {size}"
    return unread_child(module, name, class_name, known)


def _convolution_structure(module: Upstream) -> str | None:
    reason = parakeet.convolution_structure(module)
    return reason or _upstream_child(
        module, "depthwise_conv", "CausalConv1d", _CAUSAL_1D, stride=(1,), dilation=(1,)
    )


def _subsampling_structure(module: Upstream) -> str | None:
    reason = check_parts(module, ("conv_in", "layers", "act_fn", "linear"))
    if reason:
        return reason
    sizes = {"kernel_size": (3, 3), "stride": (2, 2), "dilation": (1, 1)}
    reason = _upstream_child(module, "conv_in", "CausalConv2D", _CAUSAL_2D, **sizes)
    for name, stage in module.layers._modules.items():
        reason = reason or _upstream_child(module.layers, name, "SubsamplingLayer", _STAGE)
        reason = reason or _upstream_child(stage, "depthwise_conv", "CausalConv2D", _CAUSAL_2D, **sizes)
    return reason


def encoder(
    self: Upstream,
    input_features: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Upstream = None,
    cache: Upstream = None,
    output_attention_mask: bool = True,
    use_cache: bool | None = None,
    padding_cache: Upstream = None,
    num_lookahead_tokens: int | None = None,
    past_key_values: Upstream = None,
    **kwargs: Any,
) -> Any:
    """Calls upstream's forward, except for the next chunk of streams whose frames see each other and all cached ones:
    upstream makes a mask of these pairs by torch.func.vmap, which takes as long as a layer."""
    cache = past_key_values if cache is None else cache  # its name in releases before 5.24
    frames = input_features.shape[1] // self.config.subsampling_factor
    known = attention_mask is None and position_ids is None and not kwargs and not self.training
    known = known and not torch.compiler.is_compiling() and self.config.return_dict
    asked = self.config.output_hidden_states or self.config.output_attentions
    asked = asked or getattr(self.config, "is_causal", None) is not None
    streams = padding_cache is not None and padding_cache.layers
    if streams and not self.training and (asked or not known):
        _left.note(
            self, "upstream's forward makes a mask of pairs: the chunk's call asks for more than its frames"
        )
    if not known or asked or not streams or not nemotron.sees_everything(cache, frames, num_lookahead_tokens):
        return upstream_class(self).forward(
            self, input_features, attention_mask, position_ids, cache, output_attention_mask, use_cache,
            padding_cache, num_lookahead_tokens, **kwargs,
        )  # fmt: skip
    output = sys.modules[upstream_class(self).__module__].NemotronAsrStreamingEncoderModelOutput
    name = "cache" if hasattr(output, "cache") else "past_key_values"
    caches, graphs = {name: cache, "padding_cache": padding_cache}, of(self)
    x = None
    if graphs is not None and not torch.is_grad_enabled():
        x = stream_state.next_chunk(self, graphs, input_features, name, cache, padding_cache)
    if x is None:
        x = self.subsampling(input_features, padding_cache=padding_cache)
        x *= self.input_scale
        cached = cache.get_mask_sizes(frames, 0)[0] - frames
        embeddings = self.encode_positions(x, cached_frames=cached)
        for layer in self.layers:
            x = layer(x, position_embeddings=embeddings, use_cache=use_cache, **caches)
    return output(last_hidden_state=x, **caches)


def _never_recorded(encoder: Upstream) -> str | None:
    """Returns a reason unless every part that takes a cache runs our forward: a recorded chunk passes other caches."""
    parts = [encoder.subsampling, *(m for layer in encoder.layers for m in (layer.self_attn, layer.conv))]
    ours = nemotron.cached_attention, nemotron.causal_convolution, nemotron.causal_subsampling
    others = {type(m).__name__ for m in parts if binding.bound_forward(m) not in ours}
    return f"not replaced: {', '.join(sorted(others))}" if others else None


def _rule(
    part: str,
    class_name: str,
    forward: Callable,
    structure: Callable,
    known: dict[str, str],
    kernels: str = "",
    **more: Any,
) -> Rule:
    return Rule(
        f"transformers.nemotron_{part}",
        f"NemotronAsrStreamingEncoder{class_name}",
        forward,
        structure,
        tuple(kernels.split()),
        known={value: Known(f"transformers {releases}") for value, releases in known.items()},
        **more,
    )


ATTENTION = _rule(
    "attention", "Attention", nemotron.cached_attention, _attention_structure,
    {"2c65c53d098ad1fe05072f4c": "5.24", "1710d25767b8e99381952a49": "5.17 to 5.23"},
    "linear rel_attention", release=attention.release, shared=lambda result: result[0], hooks=parakeet.CAPTURING,
    note="in training the kernel draws the weights' dropout itself, see upstream_draws",
)  # fmt: skip
CONVOLUTION = _rule(
    "convolution", "ConvolutionModule", nemotron.causal_convolution, _convolution_structure,
    {"b06d1b1a5b7542df6a8cb506": "5.17 to 5.24"},
    "linear gated_depthwise_conv norm_activation",
)  # fmt: skip
FEED_FORWARD = _rule(
    "feed_forward", "FeedForward", FastConformerFeedForward.forward, parakeet.feed_forward_structure,
    {"42a30cc7e2d4ef6832511448": "5.17 to 5.24"}, "linear_activation linear", note=DROPS,
)  # fmt: skip
SUBSAMPLING = _rule(
    "subsampling", "SubsamplingConv2D", nemotron.causal_subsampling, _subsampling_structure,
    {"ff63eb2e7f1ea0850f9768b2": "5.17 to 5.24"},
    "conv_subsampling linear_activation linear",
)  # fmt: skip
POSITIONS = _rule(
    "positions", "RelPositionalEncoding", nemotron.limited_positions, parakeet.positions_structure,
    {
        "db7d0f1bb257c2c27c9f3f30": "5.24",
        "9c01af313de053d2168e55bb": "5.19 to 5.23",
        "7b6f68fd855891340ae5144f": "5.18",
    },
    release=positions.release,
)  # fmt: skip
ENCODER = _rule(
    "encoder", "", encoder, parakeet.encoder_structure,
    {
        "3b572d4c0617e9faa8292e0a": "5.24",
        "cbaf5ceb04543d734c413d40": "5.23",
        "509491641bddcea1866ee716": "5.17 to 5.22",
    },
    shallow=True, companion=True,
    graphs=Graphed(stream_state.chunk, _never_recorded, caller=encoder),
)  # fmt: skip
RULES = (ATTENTION, CONVOLUTION, FEED_FORWARD, SUBSAMPLING, POSITIONS, ENCODER)
