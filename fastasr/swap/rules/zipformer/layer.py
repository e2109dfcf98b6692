# SPDX-License-Identifier: Apache-2.0
"""Rules for the encoder layer and its small modules: BiasNorm and the bypass."""

from dataclasses import replace

from fastasr.models import zipformer as models
from fastasr.models.zipformer import native_layer
from fastasr.models.zipformer.layer import CONSTANT_ATTENTION, constant_attention_in_eval, timed_forward
from fastasr.swap.binding import bound_forward
from fastasr.swap.rule import (
    Known,
    Rule,
    Upstream,
    check_children,
    check_ints,
    check_parameters,
    check_parts,
    check_rates,
)
from fastasr.swap.rules.zipformer.versions import BOTH, PACKAGE, ZIPVOICE, forward_and_streaming


def _bias_norm_structure(module: Upstream) -> str | None:
    shapes = {"bias": (module.num_channels,), "log_scale": ()}
    allowed = {"log_scale_min": "ScheduledFloat", "log_scale_max": "ScheduledFloat"}
    reason = check_parameters(module, shapes) or check_children(module, allowed)
    return reason or check_ints(module, ("channel_dim",))


_BYPASS_RATES = ("skip_rate", "straight_through_rate", "scale_min", "scale_max")


def _bypass_structure(module: Upstream) -> str | None:
    scale = module._parameters.get("bypass_scale")
    if scale is None or scale.ndim != 1:
        return "lacks a one-dimensional bypass_scale"
    reason = check_parameters(module, {"bypass_scale": scale.shape})
    reason = reason or check_children(module, dict.fromkeys(_BYPASS_RATES, "ScheduledFloat"))
    return reason or check_rates(module, _BYPASS_RATES)


_LAYER_PARTS = (
    *("self_attn_weights", "self_attn1", "self_attn2", "nonlin_attention"),
    *("feed_forward1", "feed_forward2", "feed_forward3", "conv_module1", "conv_module2"),
    *("bypass", "bypass_mid", "norm", "whiten"),
    *("balancer1", "balancer2", "balancer_na", "balancer_ff2", "balancer_ff3"),
)

_LAYER_RATES = (
    "attention_skip_rate",
    "conv_skip_rate",
    "const_attention_rate",
    "ff2_skip_rate",
    "ff3_skip_rate",
)


def _encoder_layer_structure(module: Upstream) -> str | None:
    """Our forward calls every submodule as upstream's does, so submodules may have any class."""
    shapes = {
        name: module._parameters[name].shape for name in ("bypass_scale",) if name in module._parameters
    }
    without = () if getattr(module, "use_conv", True) else ("conv_module1", "conv_module2")  # ZipVoice's
    parts = [name for name in _LAYER_PARTS if name not in without]
    reason = check_parts(module, parts, shapes, optional=_LAYER_RATES)
    return reason or check_rates(module, _LAYER_RATES)


def _no_adapters(module: Upstream) -> str | None:
    return "has adapters between its modules" if module.use_adapters else None


BIAS_NORM = Rule(
    name="zipformer.bias_norm",
    class_name="BiasNorm",
    forward=models.BiasNorm.forward,
    kernels=("bias_norm",),
    structure=_bias_norm_structure,
    known={"9e1dc79eb532fd8122f42674": BOTH},  # icefall: every version so far
)

BYPASS = Rule(
    name="zipformer.bypass",
    class_name="BypassModule",
    forward=models.BypassModule.forward,
    kernels=("bypass",),
    structure=_bypass_structure,
    known={"a4edc035344a0e73d0329665": BOTH},  # icefall: since pull request 1108
)


def _native_calls(module: Upstream) -> dict[str, str | None]:
    """Returns why the layer's native calls, which are for the CPU, cannot be used."""
    if bound_forward(module) is timed_forward or not all(p.is_cpu for p in module.parameters()):
        return {}  # a call's time decides this
    calls = native_layer.why_not(module)
    if bound_forward(module) is constant_attention_in_eval:
        calls["forward"] = CONSTANT_ATTENTION
    return calls


ENCODER_LAYER = Rule(
    name="zipformer.encoder_layer",
    class_name="ZipformerEncoderLayer",
    forward=models.ZipformerEncoderLayer.forward,
    methods=(("streaming_forward", models.ZipformerEncoderLayer.streaming_forward),),
    compared=("streaming_forward",),
    kernels=("zipformer_attention",),
    structure=_encoder_layer_structure,
    functions=forward_and_streaming,
    known={"b72fc595549d7a9dba5a40a1": PACKAGE},
    shallow=True,
    leaves=_native_calls,
)

ZIPFORMER2_ENCODER_LAYER = replace(
    ENCODER_LAYER,
    class_name="Zipformer2EncoderLayer",
    known={
        "b055b13e3d4fce7eb85fadf7": replace(ZIPVOICE, forward=timed_forward),
        "5718a2a12ff1cca637c6b081": Known("icefall's zipformer since pull request 1566"),
        "49cb2da3402689d14445f5b4": Known(  # and its SSL, LoRA, HENT and multi-joiner recipes
            "icefall before pull request 1566", forward=constant_attention_in_eval
        ),
        "2853abe45f57bb017c4159e0": Known(  # says nothing of tracing
            "icefall before pull request 1108", forward=constant_attention_in_eval
        ),
        "ebceec3b861625e5b7c741cb": Known(
            "icefall's zipformer_adapter", _no_adapters, constant_attention_in_eval
        ),
        "669f54ca3d25affa8d2b6816": Known(
            "icefall's zipformer_adapter before pull request 1566", _no_adapters, constant_attention_in_eval
        ),
    },
)
