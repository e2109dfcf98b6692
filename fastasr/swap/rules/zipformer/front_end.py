# SPDX-License-Identifier: Apache-2.0
"""Rules for the convolutional front end."""

import torch

from fastasr.graphs.module import OnRow
from fastasr.models import zipformer as models
from fastasr.models.zipformer import subsampling
from fastasr.swap.binding import foreign_forward
from fastasr.swap.rule import (
    Graphed,
    Known,
    Rule,
    Upstream,
    check_children,
    check_parameters,
    check_rates,
    own_forward,
    unread_code,
    upstream_class,
)
from fastasr.swap.rules.zipformer.activations import SWOOSH_L, SWOOSH_R, swoosh_functions
from fastasr.swap.rules.zipformer.regularisers import BALANCERS
from fastasr.swap.rules.zipformer.versions import BOTH

_CONVNEXT_CHILDREN = {
    "depthwise_conv": torch.nn.Conv2d,
    "pointwise_conv1": torch.nn.Conv2d,
    "hidden_balancer": "Balancer",
    "activation": "SwooshL",
    "pointwise_conv2": torch.nn.Conv2d,
    "out_balancer": "Balancer",
    "out_whiten": "Whiten",
    "layerdrop_rate": "ScheduledFloat",
}


def _convnext_structure(module: Upstream) -> str | None:
    reason = check_parameters(module, {}) or check_children(module, _CONVNEXT_CHILDREN)
    missing = sorted(set(_CONVNEXT_CHILDREN) - {"layerdrop_rate"} - set(module._modules))
    if reason or missing:
        return reason or f"lacks the submodules {', '.join(missing)}"
    if reason := check_rates(module, ("layerdrop_rate",)):
        return reason
    depthwise, expand, contract = module.depthwise_conv, module.pointwise_conv1, module.pointwise_conv2
    channels, hidden = depthwise.in_channels, expand.out_channels
    expected = {
        "depthwise_conv": (depthwise, (channels, 1, *depthwise.kernel_size)),
        "pointwise_conv1": (expand, (hidden, channels, 1, 1)),
        "pointwise_conv2": (contract, (channels, hidden, 1, 1)),
    }
    for name, (conv, shape) in expected.items():
        if upstream_class(conv) is not torch.nn.Conv2d or foreign_forward(conv) is not None:
            return f"submodule {name} is not a plain torch.nn.Conv2d"
        reason = check_parameters(conv, {"weight": shape, "bias": shape[:1]}, optional=("bias",))
        if reason:
            return f"submodule {name} {reason}"
        plain = conv.stride == (1, 1) and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
        same = name != "depthwise_conv" or conv.padding == tuple((k - 1) // 2 for k in conv.kernel_size)
        if not (plain and same and (name == "depthwise_conv" or conv.padding == (0, 0))):
            return f"submodule {name} has another stride, dilation or padding than upstream's"
    reason = unread_code("hidden_balancer", module.hidden_balancer, own_forward, BALANCERS)
    reason = reason or unread_code("out_balancer", module.out_balancer, own_forward, BALANCERS)
    return reason or unread_code("activation", module.activation, swoosh_functions, SWOOSH_L.known)


_EMBED_CONV = (
    *("Conv2d", "ScaleGrad", "Balancer", "SwooshR"),
    *("Conv2d", "Balancer", "SwooshR"),
    *("Conv2d", "Balancer", "SwooshR"),
)

_SCALE_GRAD = {"355a5d7cda322cd00a5a21ae"}  # zipformer 0.1.3, and icefall since pull request 1108


def _conv2d_subsampling_structure(module: Upstream) -> str | None:
    """conv and convnext get tensors with other strides than upstream's, so all of their code must be upstream's.

    The submodules after them get the same tensors as upstream's and may have any class (a wrapped projection).
    """
    allowed = {"conv": torch.nn.Sequential, "convnext": "ConvNeXt"}
    for name in ("out", "out_whiten", "out_norm", "dropout"):
        allowed[name] = upstream_class(getattr(module, name))
    reason = check_parameters(module, {}) or check_children(module, allowed)
    if reason:
        return reason
    conv, convnext = module.conv, module.convnext
    if upstream_class(conv) is not torch.nn.Sequential or foreign_forward(conv) is not None:
        return "submodule conv is not a plain torch.nn.Sequential"
    names = tuple(upstream_class(part).__name__ for part in conv)
    if names != _EMBED_CONV:
        return f"submodule conv holds {', '.join(names)}; upstream's holds {', '.join(_EMBED_CONV)}"
    for index, part in enumerate(conv):
        reason = _embed_conv_part(f"conv.{index}", part)
        if reason:
            return reason
    reason = unread_code("convnext", convnext, own_forward, CONVNEXT.known)
    if reason is None and (inner := _convnext_structure(convnext)):
        reason = f"submodule convnext: {inner}"
    return reason


def _embed_conv_part(name: str, part: Upstream) -> str | None:
    cls = upstream_class(part)
    if cls.__name__ == "SwooshR":
        return unread_code(name, part, swoosh_functions, SWOOSH_R.known)
    if cls.__name__ != "Conv2d":
        return unread_code(name, part, own_forward, _SCALE_GRAD | BALANCERS.keys())
    if cls is not torch.nn.Conv2d or foreign_forward(part) is not None:
        return f"submodule {name} is not a plain torch.nn.Conv2d"
    return None


CONVNEXT = Rule(
    name="zipformer.convnext",
    class_name="ConvNeXt",
    forward=models.ConvNeXt.forward,
    kernels=("depthwise_conv2d", "linear", "swoosh_linear"),
    structure=_convnext_structure,
    known={"a5bcd4f71743691dc267c6ba": BOTH},  # icefall: since pull request 1180
)

CONV2D_SUBSAMPLING = Rule(
    name="zipformer.conv2d_subsampling",
    class_name="Conv2dSubsampling",
    forward=models.Conv2dSubsampling.forward,
    structure=_conv2d_subsampling_structure,
    known={
        "0daf1ced9900d8ed1fe82020": BOTH,  # icefall: since pull request 1108
        "806777fcc2889d54c4698be2": Known("icefall's zipformer_prompt_asr"),  # says nothing of TorchScript
        "536b01a8fe378cfdf7853b9c": Known("icefall before pull request 1108"),  # nothing of tracing
    },
    note="gives its convolutions channels_last memory",
    graphs=Graphed(
        on_row=OnRow(
            subsampling.encoded,
            subsampling.packed,
            subsampling.why_no_row,
            of=lambda module: hasattr(module, "convnext"),  # E-Branchformer has another class of this name
        )
    ),
)
