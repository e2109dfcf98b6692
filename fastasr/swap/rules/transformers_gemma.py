# SPDX-License-Identifier: Apache-2.0
"""Rules for the attention of the audio towers of transformers' Gemma 3n and Gemma 4."""

from fastasr.swap import forwards as models
from fastasr.swap.rule import Known, Upstream, check_child_names, check_parameters, unread_child
from fastasr.swap.rules.conformer import attention_rule
from fastasr.swap.rules.transformers_parakeet import CAPTURING

_POSITIONS = "Gemma3nAudioRelativePositionEmbedding"
_KNOWN_POSITIONS = {"4e0480142403c3908e854b4b"}
_HIDDEN = -1e4  # A key with this score has no weight beside any that goes through the soft cap.
_LINEARS = ("q_proj", "k_proj", "v_proj")


def _structure(module: Upstream, children: tuple[str, ...], buffers: tuple[str, ...]) -> str | None:
    reason = check_parameters(module, {"per_dim_scale": (module.head_dim,)}, allowed_buffers=buffers)
    reason = reason or check_child_names(module, (*_LINEARS, *children))
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
        known={"5ac717dcc31659ded0171e82": Known("transformers 5.18 to 5.24")},
    ),
)
