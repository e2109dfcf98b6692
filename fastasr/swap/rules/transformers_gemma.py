# SPDX-License-Identifier: Apache-2.0
"""Rules for the audio towers of transformers' Gemma 3n and Gemma 4."""

from collections.abc import Callable
from operator import attrgetter

from fastasr.swap.forwards import gemma as models
from fastasr.swap.rule import Known, Rule, Upstream, check_child_names, check_parameters, unread_child
from fastasr.swap.rules.conformer import FROM_5_18, attention_rule, norm_convolution_rule
from fastasr.swap.rules.transformers_parakeet import ACTIVATIONS, CAPTURING

_POSITIONS = "Gemma3nAudioRelativePositionEmbedding"
_KNOWN_POSITIONS = {"4e0480142403c3908e854b4b"}
_HIDDEN = -1e4  # A key with this score has no weight beside any that goes through the soft cap.
_LINEARS = ("q_proj", "k_proj", "v_proj")


def _structure(module: Upstream, children: tuple[str, ...], buffers: tuple[str, ...]) -> str | None:
    reason = check_parameters(
        module, {"per_dim_scale": (module.head_dim,)}, allowed_buffers=buffers
    ) or check_child_names(module, (*_LINEARS, *children))
    if reason is None and module.max_future_horizon:
        return f"the queries see {module.max_future_horizon} frames behind them, expected 0"
    return reason


def _gemma4_structure(module: Upstream) -> str | None:
    reason = _structure(module, ("post", "relative_k_proj"), ("softcap",))
    if reason is None and module.context_size // 2 != module.max_past_horizon:
        return f"chunks of {module.chunk_size} frames have {module.context_size // 2 + 1} positions"
    if reason is None and module.config.attention_invalid_logits_value > _HIDDEN:
        return f"attention_invalid_logits_value is {module.config.attention_invalid_logits_value}"
    return reason


def _gemma3n_structure(module: Upstream) -> str | None:
    buffers = ("softcap", "q_scale", "local_causal_valid_mask")
    name = "relative_position_embedding"
    reason = _structure(module, (name,), buffers)
    return reason or unread_child(module, name, _POSITIONS, _KNOWN_POSITIONS)


# Classes that the forwards of others run without a call of them, and their known code
_READ = {
    "Gemma4RMSNorm": "b093ef7fb8e164c46ecc0a3f",
    "Gemma4AudioCausalConv1d": "6cf5e53c223d1cceff7b016a",
    "Gemma4ClippableLinear": "b8238c1a830483a1e02b564a",
    "Gemma4AudioFeedForward": "3b02aa78415b64cc35f768b7",
    "Gemma4AudioLightConv1d": "70f8d63ea4696e98497bff65",
    "Gemma3nRMSNorm": "d5afb8eab0312ee4395d5181",
    "Gemma3nAudioCumulativeGroupNorm": "1bfb85d1573d89d993a51b59",
    "Gemma3nAudioConformerFeedForward": "85d7f8cb394f9243869c9b28",
    "Gemma3nAudioConformerLightConv1d": "e45de22b99364eb516f7fe53",
    "Gemma3nAudioConformerAttention": "07316afe71e02f0f58160d54",
}
_BOUNDS = ("input_min", "input_max", "output_min", "output_max")
_FEED_FORWARD = ("ffw_layer_1", "ffw_layer_2", "pre_layer_norm", "post_layer_norm")
_CONVOLUTION = ("linear_start", "linear_end", "depthwise_conv1d", "pre_layer_norm", "conv_norm")


def _part(*children: str) -> Callable:
    """Returns the check of a part with these children, whose code is known where the class is one of Gemma's."""

    def structure(module: Upstream) -> str | None:
        reason = check_parameters(module, {}, allowed_buffers=("gradient_clipping",))  # Gemma 3n's have it.
        reason = reason or check_child_names(module, children)
        for name in children:
            reason = reason or unread_child(module, name, *ACTIVATIONS)
            for class_name, code in _READ.items():
                reason = reason or unread_child(module, name, class_name, {code})
        return reason or (_plain_conv(module.conv) if "conv" in children else _clipped(module))

    return structure


def _plain_conv(conv: Upstream) -> str | None:
    found = conv.groups, conv.dilation, conv.padding_mode
    return None if found == (1, (1, 1), "zeros") else f"conv has groups, dilation and padding mode {found}"


def _clipped(module: Upstream) -> str | None:
    limit = module.config.gradient_clipping
    return None if limit > 0 else f"gradient_clipping is {limit}, expected a positive number"


def _clippable_structure(module: Upstream) -> str | None:
    reason = check_parameters(module, {}, allowed_buffers=_BOUNDS if module.use_clipped_linears else ())
    return reason or check_child_names(module, ("linear",))


def _layer(parts: tuple[str, ...], norms: tuple[str, ...]) -> Callable:
    """Returns the check of a layer with these parts, in the order of their use, and these norms: before and behind the
    attention and at the end."""
    first, _, convolution, last = parts
    part = _part(*parts, *(name for name in norms if "." not in name))
    norms += f"{first}.post_layer_norm", f"{convolution}.pre_layer_norm", f"{last}.post_layer_norm"

    def structure(module: Upstream) -> str | None:
        reason = part(module)
        found = [] if reason else sorted({norm.eps for norm in attrgetter(*norms)(module)})
        return f"the norms add {found}, expected one number" if len(found) > 1 else reason

    return structure


RULES = (
    attention_rule(
        name="transformers.gemma4_attention",
        class_name="Gemma4AudioAttention",
        forward=models.gemma4_attention,
        structure=_gemma4_structure,
        known={"c632d7d3aac083b74556bbe7": Known("transformers 5.20 to 5.24")},
        shared=lambda result: result[0],
        hooks=CAPTURING,
        note="the weights are not returned",
        kernels=("rel_attention",),
    ),
    attention_rule(
        name="transformers.gemma3n_attention",
        class_name="Gemma3nAudioAttention",
        forward=models.gemma3n_attention,
        structure=_gemma3n_structure,
        known={"5ac717dcc31659ded0171e82": FROM_5_18},
    ),
    Rule(
        name="transformers.gemma4_clippable_linear",
        class_name="Gemma4ClippableLinear",
        forward=models.gemma4_clippable_linear,
        structure=_clippable_structure,
        known={_READ["Gemma4ClippableLinear"]: FROM_5_18},
        kernels=("clamped_linear",),
    ),
    Rule(
        name="transformers.gemma4_feed_forward",
        class_name="Gemma4AudioFeedForward",
        forward=models.gemma_feed_forward,
        structure=_part(*_FEED_FORWARD, "act_fn"),
        known={_READ["Gemma4AudioFeedForward"]: FROM_5_18},
        kernels=("norm_activation", "clamped_linear"),
    ),
    norm_convolution_rule(
        name="transformers.gemma4_convolution",
        class_name="Gemma4AudioLightConv1d",
        forward=models.gemma_light_convolution,
        structure=_part(*_CONVOLUTION, "act_fn"),
        known={_READ["Gemma4AudioLightConv1d"]: FROM_5_18},
        kernels=("clamped_linear", "gated_depthwise_conv", "norm_activation"),
    ),
    Rule(
        name="transformers.gemma4_layer",
        class_name="Gemma4AudioLayer",
        forward=models.gemma4_layer,
        structure=_layer(
            ("feed_forward1", "self_attn", "lconv1d", "feed_forward2"),
            ("norm_pre_attn", "norm_post_attn", "norm_out"),
        ),
        known={"6ee3d804dff2937eab4cf172": FROM_5_18},
        kernels=("add_norm", "norm_activation", "clamped_linear", "gated_depthwise_conv"),
        hooks=CAPTURING,
    ),
    Rule(
        name="transformers.gemma4_subsampling",
        class_name="Gemma4AudioSubSampleConvProjectionLayer",
        forward=models.gemma4_subsampling,
        structure=_part("conv", "norm", "act"),
        known={"6d64ca24b69deb79f81d6692": FROM_5_18},
        kernels=("linear", "norm_activation"),
    ),
    Rule(
        name="transformers.gemma3n_feed_forward",
        class_name="Gemma3nAudioConformerFeedForward",
        forward=models.gemma_feed_forward,
        structure=_part(*_FEED_FORWARD),
        known={_READ["Gemma3nAudioConformerFeedForward"]: FROM_5_18},
        kernels=("norm_activation", "linear_activation", "linear"),
    ),
    norm_convolution_rule(
        name="transformers.gemma3n_convolution",
        class_name="Gemma3nAudioConformerLightConv1d",
        forward=models.gemma_light_convolution,
        structure=_part(*_CONVOLUTION),
        known={_READ["Gemma3nAudioConformerLightConv1d"]: FROM_5_18},
    ),
    Rule(
        name="transformers.gemma3n_layer",
        class_name="Gemma3nAudioConformerBlock",
        forward=models.gemma3n_layer,
        structure=_layer(
            ("ffw_layer_start", "attention", "lconv1d", "ffw_layer_end"),
            ("attention.pre_attn_norm", "attention.post_norm", "norm"),
        ),
        known={"3485656f30d238fd876dada4": FROM_5_18},
        kernels=("add_norm", "norm_activation", "linear_activation", "linear", "gated_depthwise_conv"),
        hooks=CAPTURING,
    ),
    Rule(
        name="transformers.gemma3n_subsampling",
        class_name="Gemma3nAudioSSCPConvBlock",
        forward=models.gemma3n_subsampling,
        structure=_part("conv", "norm", "activation"),
        known={"2ac1ab5d366a7ce6dc45da70": FROM_5_18},
        kernels=("linear",),
    ),
)
