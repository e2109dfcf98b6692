# SPDX-License-Identifier: Apache-2.0
"""Rules for the convolution module, plain and chunk-causal."""

import torch

from fastasr.models import zipformer as models
from fastasr.swap.binding import foreign_forward
from fastasr.swap.rule import (
    Known,
    Rule,
    Upstream,
    check_children,
    check_parameters,
    own_forward,
    unread_code,
    upstream_class,
)
from fastasr.swap.rules.zipformer.regularisers import BALANCERS, WHITENS
from fastasr.swap.rules.zipformer.versions import BOTH, ICEFALL, IDENTITIES, ZIPVOICE, forward_and_streaming

_CONVOLUTION_CHILDREN = {
    "balancer1": "Balancer",
    "activation1": "Identity",
    "sigmoid": torch.nn.Sigmoid,
    "activation2": "Identity",
    "balancer2": "Balancer",
    "whiten": "Whiten",
}

# ChunkCausalDepthwiseConv1d: fingerprint of forward and streaming_forward -> origin of the version
CHUNK_CAUSAL = {
    "5966ecc233800c72c950d9bb": BOTH.origin,
    "dd67efc8ef82285f83940ad6": "icefall's zipformer_lora",
}


def _convolution_structure(module: Upstream) -> str | None:
    """Our forward calls in_proj and out_proj as upstream's does, so these may have any class."""
    causal = getattr(module, "causal", False)  # ZipVoice has no causal ones
    conv = "ChunkCausalDepthwiseConv1d" if causal else torch.nn.Conv1d
    allowed = _CONVOLUTION_CHILDREN | {"depthwise_conv": conv}
    for name in ("in_proj", "out_proj"):
        allowed[name] = upstream_class(getattr(module, name))
    reason = check_parameters(module, {}) or check_children(module, allowed)
    missing = sorted(set(allowed) - set(module._modules))
    if reason or missing:
        return reason or f"lacks the submodules {', '.join(missing)}"
    if upstream_class(module.sigmoid) is not torch.nn.Sigmoid or foreign_forward(module.sigmoid) is not None:
        return "submodule sigmoid is not a plain torch.nn.Sigmoid"
    over_time = _chunk_causal if causal else _depthwise_over_time
    reason = over_time("depthwise_conv", module.depthwise_conv)
    for name, known in (
        ("balancer1", BALANCERS),
        ("activation1", IDENTITIES),
        ("activation2", IDENTITIES),
        ("balancer2", BALANCERS),
        ("whiten", WHITENS),
    ):
        reason = reason or unread_code(name, getattr(module, name), own_forward, known)
    return reason


def _depthwise_over_time(name: str, conv: Upstream, causal: bool = False) -> str | None:
    if upstream_class(conv) is not torch.nn.Conv1d or foreign_forward(conv) is not None:
        return f"submodule {name} is not a plain torch.nn.Conv1d"
    channels, taps = conv.in_channels, conv.kernel_size[0]
    shapes = {"weight": (channels, 1, taps), "bias": (channels,)}
    reason = check_parameters(conv, shapes, optional=("bias",))
    if reason:
        return f"submodule {name} {reason}"
    found = (conv.groups, conv.stride, conv.dilation, conv.padding, conv.padding_mode)
    if found != (channels, (1,), (1,), (0 if causal else taps // 2,), "zeros") or not (causal or taps % 2):
        return f"submodule {name} has other groups, stride, dilation or padding than upstream's"
    return None


def _chunk_causal(name: str, conv: Upstream) -> str | None:
    taps, channels = conv.kernel_size, conv.chunkwise_conv.in_channels
    reason = check_parameters(conv, {"chunkwise_conv_scale": (2, channels, taps)})
    reason = reason or check_children(
        conv, {"causal_conv": torch.nn.Conv1d, "chunkwise_conv": torch.nn.Conv1d}
    )
    if reason:
        return f"submodule {name} {reason}"
    reason = unread_code(name, conv, forward_and_streaming, CHUNK_CAUSAL)
    reason = reason or _depthwise_over_time(f"{name}.chunkwise_conv", conv.chunkwise_conv)
    reason = reason or _depthwise_over_time(f"{name}.causal_conv", conv.causal_conv, causal=True)
    found = conv.chunkwise_conv.kernel_size, conv.causal_conv.kernel_size, conv.causal_conv.in_channels
    if reason is None and found != ((taps,), (taps // 2 + 1,), channels):
        reason = f"submodule {name} has convolutions of other sizes than upstream's"
    return reason


CONVOLUTION = Rule(
    name="zipformer.convolution",
    class_name="ConvolutionModule",
    forward=models.ConvolutionModule.forward,
    methods=(("streaming_forward", models.ConvolutionModule.streaming_forward),),
    compared=("streaming_forward",),
    kernels=("gated_depthwise_conv",),
    structure=_convolution_structure,
    functions=forward_and_streaming,
    known={
        "df95c5ab6f048b58a93ee9ed": BOTH,  # icefall: since pull request 1316
        "b5bd3f4a492521f8cb150326": ZIPVOICE,
        "4053a40ef406b863c3dcc02f": ICEFALL,  # since pull request 2086, which converts masks to bool
        "6c0ecf0385c1b92430724293": Known("icefall before pull request 1316"),  # and in some recipes since
        "4fa18653b036d5169f44cf57": Known("icefall before pull request 1316"),  # other spelling of the halves
        "6d54719e8a05aad902314433": Known("icefall before pull request 1108"),  # says nothing of tracing
    },
)
