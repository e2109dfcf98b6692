# SPDX-License-Identifier: Apache-2.0
"""Rules for transformers' speech encoders whose layers are a Transformer's, without their decoders."""

from collections.abc import Callable
from typing import Any

from fastasr.swap.forwards import transformers_audio_towers as models
from fastasr.swap.forwards.common import other_scale
from fastasr.swap.rule import Known, Rule, Upstream, check_parts, holds
from fastasr.swap.rules.conformer import attention_rule, feed_forward_rule
from fastasr.swap.rules.torch import CONVOLUTIONS
from fastasr.swap.rules.transformers_conformer import NOTE
from fastasr.swap.rules.transformers_parakeet import ACTIVATIONS, CAPTURING

_READ = Known("transformers 5.24")
_LINEARS = ("q_proj", "k_proj", "v_proj")


def _attention_structure(module: Upstream, *last: str) -> str | None:
    if (reason := other_scale(module)) is not None:
        return reason
    if module.num_key_value_groups != 1:
        return f"num_key_value_groups is {module.num_key_value_groups}, expected 1"
    return check_parts(module, (*_LINEARS, *(last or ("o_proj",))))


# --------------------------------------------------------------------------- recordings in a row
_LAYER = "self_attn", "self_attn_layer_norm", "activation_fn", "fc1", "fc2", "final_layer_norm"
# Name -> the fingerprints of its attention and of its layer, which have one code
_ROWS = {
    "Qwen3ASR": ("22bba7c4ac8ff8b0fddbedf2", "0310774ef21e0c300e8f46f7"),
    "Qwen2_5Omni": ("3e0f426206b744df4fb8ac83", "e4dbfea680d31c750f47004b"),
    "Qwen3OmniMoe": ("8f08abef8213a107ec9a6307", "2bde166c9a1ba1473a8a6942"),
}


def _row_rules(name: str, attention: str, layer: str) -> tuple[Rule, ...]:
    return (
        attention_rule(
            name=f"transformers.{name}_audio_attention",
            class_name=f"{name}AudioAttention",
            forward=models.row_attention,
            structure=lambda module: _attention_structure(module, "out_proj"),
            known={attention: _READ},
            hooks=CAPTURING,
            note="in training the kernel draws the weights' dropout itself, see upstream_draws",
        ),
        Rule(
            name=f"transformers.{name}_audio_layer",
            class_name=f"{name}AudioEncoderLayer",
            forward=models.row_layer,
            structure=holds(*_LAYER, activation_fn=ACTIVATIONS),
            known={layer: _READ},
            hooks=CAPTURING,
            kernels=("linear_activation", "linear"),
        ),
    )


# --------------------------------------------------------------------------- batches
def _moonshine_structure(module: Upstream) -> str | None:
    return "is causal: the decoder's" if module.is_causal else _attention_structure(module)


def _normed_structure(module: Upstream) -> str | None:
    return _attention_structure(module, "o_proj", "q_norm", "k_norm")


def _fun_asr_structure(module: Upstream) -> str | None:
    return _attention_structure(module, "o_proj", *(() if module.fsmn is None else ("fsmn",)))


def _mlp(name: str, class_name: str, activation: str, code: str) -> Rule:
    code_of: dict[str, Any] = {activation: ACTIVATIONS}
    return feed_forward_rule(
        name=f"transformers.{name}_feed_forward",
        class_name=class_name,
        forward=models.mlp,
        structure=holds("fc1", activation, "fc2", **code_of),
        known={code: _READ},
        note="",  # it has no dropout
    )


def _attention(
    name: str,
    class_name: str,
    code: str,
    structure: Callable = _attention_structure,
    forward: Callable = models.rotary_attention,
) -> Rule:
    return attention_rule(
        name=f"transformers.{name}_attention",
        class_name=class_name,
        forward=forward,
        structure=structure,
        known={code: _READ},
        shared=lambda result: result[0],
        hooks=CAPTURING,
        note=NOTE,
    )


def _causal_structure(module: Upstream) -> str | None:
    plain = (module.dilation, module.groups, module.padding) == ((1,), 1, (0,))
    return None if plain else "has groups, dilation or padding of its own"


def _causal(name: str, class_name: str, code: str, forward: Callable) -> Rule:
    return Rule(
        name=f"transformers.{name}_convolution",
        class_name=class_name,
        forward=forward,
        structure=_causal_structure,
        known={code: _READ},
    )


_VOXTRAL_NORM = "VoxtralRealtimeRMSNorm", {"e1a6b40fea5c2a1a0a564867"}
VOXTRAL_REALTIME = (
    _causal(
        "voxtral_realtime",
        "VoxtralRealtimeCausalConv1d",
        "ff0388341fd76f61a1d3b2b5",
        models.voxtral_realtime_convolution,
    ),
    _attention("voxtral_realtime", "VoxtralRealtimeAttention", "458333df16ba3bba65a7f61e"),
    Rule(
        name="transformers.voxtral_realtime_feed_forward",
        class_name="VoxtralRealtimeMLP",
        forward=models.gated_mlp,
        structure=holds("gate_proj", "up_proj", "down_proj", "act_fn", act_fn=ACTIVATIONS),
        known={"0648f076c2490dc100462ebb": _READ},
        kernels=("linear_activation", "linear"),
    ),
    Rule(
        name="transformers.voxtral_realtime_layer",
        class_name="VoxtralRealtimeEncoderLayer",
        forward=models.voxtral_realtime_layer,
        structure=holds(
            "self_attn", "self_attn_layer_norm", "activation_fn", "final_layer_norm", "mlp",
            self_attn_layer_norm=_VOXTRAL_NORM, final_layer_norm=_VOXTRAL_NORM,
        ),
        known={"e784325486be040e0acd6926": _READ},
        kernels=("norm_activation", "add_norm"),
        hooks=CAPTURING,
    ),
)  # fmt: skip

RULES = (
    *(rule for name, prints in _ROWS.items() for rule in _row_rules(name, *prints)),
    _attention("glmasr", "GlmAsrAttention", "1a3ff53cc0947666600f413c"),
    _mlp("glmasr", "GlmAsrMLP", "act_fn", "39c928dd7d2e46151a8d18f9"),
    _attention("moonshine", "MoonshineAttention", "bd382e5b4d70c3fb7d112b30", _moonshine_structure),
    _mlp("moonshine", "MoonshineEncoderMLP", "activation_fn", "dede4c2120bd68408bfbd9d1"),
    *VOXTRAL_REALTIME,
    _attention("lasr", "LasrEncoderAttention", "72258f0fa648c245a553210b"),
    _attention(
        "fun_asr",
        "FunAsrNanoAttention",
        "f3a8d75bd947b275d9646c47",
        _fun_asr_structure,
        models.fun_asr_attention,
    ),
    _attention(
        "moonshine_streaming",
        "MoonshineStreamingEncoderAttention",
        "937cf49baf9eaca8b28a078b",
        forward=models.windowed_attention,
    ),
    _attention(
        "nemotron_transcribe", "Nemotron3_5TranscribeAttention", "caf9315ae64c0ce71e9849cf", _normed_structure
    ),
    _mlp("nemotron_transcribe", "Nemotron3_5TranscribeMLP", "activation_fn", "1d68bf71bb4784156633c9f7"),
    _attention("nemotron_diarization", "Nemotron3DiarizationAttention", "5872927f2dfe5df760853623"),
    _mlp("nemotron_diarization", "Nemotron3DiarizationMLP", "activation_fn", "31de22ba310d239531f6de51"),
    _attention("mimi", "MimiAttention", "c9becfacd9b93e9ab64abb22", forward=models.mimi_attention),
    _mlp("mimi", "MimiMLP", "activation_fn", "8d05a9460e3325329ca89283"),
    _causal(
        "moonshine_streaming",
        "MoonshineStreamingCausalConv1d",
        "9ac26086d8ae11ed81be89fb",
        models.moonshine_streaming_convolution,
    ),
    _mlp("moonshine_streaming", "MoonshineStreamingEncoderMLP", "activation_fn", "23cfcc2a258bd67e10355e5c"),
    *CONVOLUTIONS,
)
