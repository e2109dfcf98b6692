# SPDX-License-Identifier: Apache-2.0
"""Rules for Zipformer: the ``zipformer`` package and the icefall recipe folders that carry the same classes.

Fingerprints come from ``fastasr.swap.source_hash``; ``docs/swap.md`` says how to compute one. icefall's
Swoosh classes call k2, whose backward pass rounds the derivative to 8 bits at random; ours is exact.
"""

from dataclasses import replace

import torch
from torch.nn.utils import parametrize

from fastasr.models import zipformer as models
from fastasr.models.zipformer.layer import constant_attention_in_eval
from fastasr.swap.binding import foreign_forward
from fastasr.swap.rules import (
    Known,
    Rule,
    check_children,
    check_parameters,
    is_rate,
    own_forward,
    unread_code,
    upstream_class,
)

_PACKAGE = Known("zipformer 0.1.3")  # on PyPI
_ICEFALL = Known("icefall's zipformer")  # egs/*/*/zipformer
_BOTH = Known("zipformer 0.1.3 and icefall's zipformer")


def _swoosh_functions(module):
    """icefall calls k2 by name; the package keeps its function, compiled or not, in ``func``."""
    return own_forward(module) + ([module.func] if hasattr(module, "func") else [])


def _swoosh_structure(module):
    return check_parameters(module, {}) or check_children(module, {})


def _adl_functions(module):
    extra = [getattr(module, name) for name in ("forward_func", "backward_func") if hasattr(module, name)]
    return own_forward(module) + extra


def _adl_structure(module):
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2:
        return "lacks a two-dimensional weight"
    shapes = {"weight": weight.shape, "bias": weight.shape[:1]}
    reason = check_parameters(module, shapes, optional=("bias",))
    reason = reason or check_children(module, {"dropout_p": "ScheduledFloat"})
    if reason:
        return reason
    if module.activation not in ("SwooshL", "SwooshR"):
        return f"activation is {module.activation!r}, expected 'SwooshL' or 'SwooshR'"
    for name, suffix in (("forward_func", ""), ("backward_func", "_and_deriv")):
        function = getattr(module, name, None)
        expected = f"_{module.activation.lower()}{suffix}"
        if function is not None and _name(function) != expected:
            return f"{name} is {_name(function)}, expected {expected}"
    if not is_rate(module.dropout_p):
        return f"dropout_p is a {type(module.dropout_p).__name__}, expected a number or a schedule"
    shared = module.dropout_shared_dim
    if shared is not None and not isinstance(shared, int):
        return f"dropout_shared_dim is {shared!r}, expected an int or None"
    return None


def _name(function):
    inner = getattr(function, "_torchdynamo_orig_callable", function)
    return getattr(inner, "__name__", type(inner).__name__)


def _scheduled_or_no_dropout(module):
    """Before icefall's pull request 1770 the dropout rate also acted in eval mode, where schedules have a
    default.
    """
    if getattr(module.dropout_p, "default", module.dropout_p) != 0:
        return "this version of the class applies dropout_p in eval mode too"
    return None


def _bias_norm_structure(module):
    shapes = {"bias": (module.num_channels,), "log_scale": ()}
    allowed = {"log_scale_min": "ScheduledFloat", "log_scale_max": "ScheduledFloat"}
    reason = check_parameters(module, shapes) or check_children(module, allowed)
    if reason is None and not isinstance(module.channel_dim, int):
        reason = f"channel_dim is {module.channel_dim!r}, expected an int"
    return reason


_BYPASS_RATES = ("skip_rate", "straight_through_rate", "scale_min", "scale_max")


def _bypass_structure(module):
    scale = module._parameters.get("bypass_scale")
    if scale is None or scale.ndim != 1:
        return "lacks a one-dimensional bypass_scale"
    reason = check_parameters(module, {"bypass_scale": scale.shape})
    reason = reason or check_children(module, dict.fromkeys(_BYPASS_RATES, "ScheduledFloat"))
    for name in _BYPASS_RATES:
        if reason is None and not is_rate(getattr(module, name)):
            reason = f"{name} is a {type(getattr(module, name)).__name__}, expected a number or a schedule"
    return reason


def _linear_structure(module):
    if upstream_class(module) is not torch.nn.Linear:
        return f"is a subclass of torch.nn.Linear ({type(module).__module__}.{type(module).__qualname__})"
    shapes = {"weight": (module.out_features, module.in_features), "bias": (module.out_features,)}
    return check_parameters(module, shapes, optional=("bias",)) or check_children(module, {})


_CONVNEXT_CHILDREN = {
    "depthwise_conv": "Conv2d",
    "pointwise_conv1": "Conv2d",
    "hidden_balancer": "Balancer",
    "activation": "SwooshL",
    "pointwise_conv2": "Conv2d",
    "out_balancer": "Balancer",
    "out_whiten": "Whiten",
    "layerdrop_rate": "ScheduledFloat",
}

# Inference leaves the balancers out: these versions return their input when it needs no gradient.
_BALANCERS = {
    "11eb10d0735c5e5c3fea5f1a": _PACKAGE,
    "5b8544f975686064be524bb7": _ICEFALL,  # since pull request 1974
    "5e2cd40d81ed3f21460c0365": Known("icefall before pull request 1974"),
    "ea1e082139b9f1b7c8175862": Known("icefall before pull request 1108"),  # and its zipformer_prompt_asr
}
_BALANCER_LIMITS = ("prob", "min_positive", "max_positive", "min_abs", "max_abs", "grad_scale")


def _balancer_structure(module):
    reason = check_parameters(module, {})
    reason = reason or check_children(module, dict.fromkeys(_BALANCER_LIMITS, "ScheduledFloat"))
    for name in _BALANCER_LIMITS:
        if reason is None and not is_rate(getattr(module, name)):
            reason = f"{name} is a {type(getattr(module, name)).__name__}, expected a number or a schedule"
    for name in ("num_channels", "channel_dim"):
        if reason is None and not isinstance(getattr(module, name), int):
            reason = f"{name} is {getattr(module, name)!r}, expected an int"
    return reason


def _convnext_structure(module):
    reason = check_parameters(module, {}) or check_children(module, _CONVNEXT_CHILDREN)
    missing = sorted(set(_CONVNEXT_CHILDREN) - {"layerdrop_rate"} - set(module._modules))
    if reason or missing:
        return reason or f"lacks the submodules {', '.join(missing)}"
    if not is_rate(module.layerdrop_rate):
        return f"layerdrop_rate is a {type(module.layerdrop_rate).__name__}, expected a number or a schedule"
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
    reason = unread_code("hidden_balancer", module.hidden_balancer, own_forward, _BALANCERS)
    reason = reason or unread_code("out_balancer", module.out_balancer, own_forward, _BALANCERS)
    return reason or unread_code("activation", module.activation, _swoosh_functions, SWOOSH_L.known)


_EMBED_CONV = (
    *("Conv2d", "ScaleGrad", "Balancer", "SwooshR"),
    *("Conv2d", "Balancer", "SwooshR"),
    *("Conv2d", "Balancer", "SwooshR"),
)
_SCALE_GRAD = {"355a5d7cda322cd00a5a21ae"}  # zipformer 0.1.3, and icefall since pull request 1108


def _conv2d_subsampling_structure(module):
    """conv and convnext, which see other strides, must be upstream's through and through.

    What follows them gets the same tensors as ever, so any class will do there (a wrapped projection).
    """
    allowed = {"conv": "Sequential", "convnext": "ConvNeXt"}
    for name in ("out", "out_whiten", "out_norm", "dropout"):
        allowed[name] = upstream_class(getattr(module, name)).__name__
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


def _embed_conv_part(name, part):
    cls = upstream_class(part)
    if cls.__name__ == "SwooshR":
        return unread_code(name, part, _swoosh_functions, SWOOSH_R.known)
    if cls.__name__ != "Conv2d":
        return unread_code(name, part, own_forward, _SCALE_GRAD | _BALANCERS.keys())
    if cls is not torch.nn.Conv2d or foreign_forward(part) is not None:
        return f"submodule {name} is not a plain torch.nn.Conv2d"
    return None


_CONVOLUTION_CHILDREN = {
    "balancer1": "Balancer",
    "activation1": "Identity",
    "sigmoid": "Sigmoid",
    "activation2": "Identity",
    "balancer2": "Balancer",
    "whiten": "Whiten",
}

# The identities are left out, and inference leaves the second balancer and the whitening out.
_IDENTITIES = {
    "e87203451183b502ecc10090",  # zipformer 0.1.3, and icefall since pull request 1108
    "b84fe666b5dfd19e547474b5",  # icefall before it, and its zipformer_prompt_asr
}
_WHITENS = {
    "59f435fe5116d207ed3b2a9d",  # zipformer 0.1.3
    "2427f1994408e76d9e722891",  # icefall since pull request 1974
    "c3009322678ced8184ee6400",  # icefall since pull request 1663
    "f27d60a9ca1403688b23218a",  # icefall before it
    "f78c8e3e256cd2088a274bfd",  # icefall before pull request 1108, and its zipformer_prompt_asr
}


_CHUNK_CAUSAL = {
    "5966ecc233800c72c950d9bb",  # zipformer 0.1.3 and icefall
    "dd67efc8ef82285f83940ad6",  # icefall's zipformer_lora
}


def _forward_and_streaming(module):
    streaming = getattr(upstream_class(module), "streaming_forward", None)
    return own_forward(module) + ([streaming] if streaming else [])


def _convolution_structure(module):
    """in_proj and out_proj are called with the values of ever, so any class will do there."""
    conv = "ChunkCausalDepthwiseConv1d" if module.causal else "Conv1d"
    allowed = _CONVOLUTION_CHILDREN | {"depthwise_conv": conv}
    for name in ("in_proj", "out_proj"):
        allowed[name] = upstream_class(getattr(module, name)).__name__
    reason = check_parameters(module, {}) or check_children(module, allowed)
    missing = sorted(set(allowed) - set(module._modules))
    if reason or missing:
        return reason or f"lacks the submodules {', '.join(missing)}"
    if upstream_class(module.sigmoid) is not torch.nn.Sigmoid or foreign_forward(module.sigmoid) is not None:
        return "submodule sigmoid is not a plain torch.nn.Sigmoid"
    over_time = _chunk_causal if module.causal else _depthwise_over_time
    reason = over_time("depthwise_conv", module.depthwise_conv)
    for name, known in (
        ("balancer1", _BALANCERS),
        ("activation1", _IDENTITIES),
        ("activation2", _IDENTITIES),
        ("balancer2", _BALANCERS),
        ("whiten", _WHITENS),
    ):
        reason = reason or unread_code(name, getattr(module, name), own_forward, known)
    return reason


def _depthwise_over_time(name, conv, causal=False):
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


def _chunk_causal(name, conv):
    taps, channels = conv.kernel_size, conv.chunkwise_conv.in_channels
    reason = check_parameters(conv, {"chunkwise_conv_scale": (2, channels, taps)})
    reason = reason or check_children(conv, {"causal_conv": "Conv1d", "chunkwise_conv": "Conv1d"})
    if reason:
        return f"submodule {name} {reason}"
    reason = unread_code(name, conv, _forward_and_streaming, _CHUNK_CAUSAL)
    reason = reason or _depthwise_over_time(f"{name}.chunkwise_conv", conv.chunkwise_conv)
    reason = reason or _depthwise_over_time(f"{name}.causal_conv", conv.causal_conv, causal=True)
    found = conv.chunkwise_conv.kernel_size, conv.causal_conv.kernel_size, conv.causal_conv.in_channels
    if reason is None and found != ((taps,), (taps // 2 + 1,), channels):
        reason = f"submodule {name} has convolutions of other sizes than upstream's"
    return reason


_ATTENTION_WEIGHTS_CHILDREN = (
    "in_proj",
    "linear_pos",
    "balance_keys",
    "whiten_keys",
    "copy_query",
    "copy_pos_query",
)


def _attention_weights_structure(module):
    """Every submodule is called with the values of ever, so any class will do."""
    reason = check_parameters(module, {})
    reason = reason or _check_names(module, _ATTENTION_WEIGHTS_CHILDREN, optional=("pos_emb_skip_rate",))
    for name in ("num_heads", "query_head_dim", "pos_head_dim"):
        if not isinstance(getattr(module, name, None), int):
            reason = reason or f"{name} is {getattr(module, name, None)!r}, expected an int"
    for name in ("dropout", "pos_emb_skip_rate"):
        if not is_rate(getattr(module, name, None)):
            reason = reason or f"{name} is {getattr(module, name, None)!r}, expected a number or a schedule"
    if reason is not None:
        return reason
    width = module.num_heads * (2 * module.query_head_dim + module.pos_head_dim)
    weight = getattr(module.in_proj, "weight", None)
    if weight is None or tuple(weight.shape[:1]) != (width,):
        return f"in_proj does not give {width} channels, heads * (2 * query_head_dim + pos_head_dim)"
    return None


def _whiten_structure(module):
    limits = ("whitening_limit", "grad_scale")
    reason = check_parameters(module, {}) or check_children(module, dict.fromkeys(limits, "ScheduledFloat"))
    for name in (*limits, "prob", "min_prob", "max_prob"):
        if reason is None and not is_rate(getattr(module, name)):
            reason = f"{name} is a {type(getattr(module, name)).__name__}, expected a number or a schedule"
    if reason is None and not isinstance(module.num_groups, int):
        reason = f"num_groups is {module.num_groups!r}, expected an int"
    return reason


def _grad_scale_is_a_number(module):
    """These versions multiply a tensor by it, which a schedule cannot do."""
    if isinstance(module.grad_scale, (int, float)):
        return None
    return f"grad_scale is a {type(module.grad_scale).__name__}, which this version of the class cannot use"


def _self_attention_structure(module):
    """Every submodule is called with the values of ever, so any class will do."""
    return check_parameters(module, {}) or _check_names(module, ("in_proj", "out_proj", "whiten"))


_NONLIN_IDENTITIES = ("identity1", "identity2", "identity3")
_NONLIN_CHILDREN = ("in_proj", "balancer", "tanh", *_NONLIN_IDENTITIES, "out_proj", "whiten1", "whiten2")


def _nonlin_attention_structure(module):
    """The hyperbolic tangent and the identities are left out; the rest is called with the values of ever, so any class
    will do there.
    """
    reason = check_parameters(module, {}) or _check_names(module, _NONLIN_CHILDREN)
    if reason is not None:
        return reason
    if upstream_class(module.tanh) is not torch.nn.Tanh or foreign_forward(module.tanh) is not None:
        return "submodule tanh is not a plain torch.nn.Tanh"
    for name in _NONLIN_IDENTITIES:
        reason = reason or unread_code(name, getattr(module, name), own_forward, _IDENTITIES)
    weight = getattr(module.in_proj, "weight", None)
    if reason is None and (weight is None or tuple(weight.shape[:1]) != (3 * module.hidden_channels,)):
        reason = f"in_proj does not give {3 * module.hidden_channels} channels, 3 * hidden_channels"
    return reason


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


def _encoder_layer_structure(module):
    """Every submodule is called with the values of ever, so any class will do."""
    shapes = {
        name: module._parameters[name].shape for name in ("bypass_scale",) if name in module._parameters
    }
    reason = check_parameters(module, shapes) or _check_names(module, _LAYER_PARTS, optional=_LAYER_RATES)
    for name in _LAYER_RATES:
        if reason is None and not is_rate(getattr(module, name)):
            reason = f"{name} is a {type(getattr(module, name)).__name__}, expected a number or a schedule"
    return reason


def _no_adapters(module):
    return "has adapters between its modules" if module.use_adapters else None


def _check_names(module, names, optional=()):
    """A reason when the submodules are not ``names``, of any class, besides ``optional``; else None."""
    children = {name for name, child in module._modules.items() if child is not None}
    extra, missing = sorted(children - {*names, *optional}), sorted(set(names) - children)
    if extra:
        return f"has submodules this class does not have upstream: {', '.join(extra)}"
    return f"lacks the submodules {', '.join(missing)}" if missing else None


_JOINERS = {
    "958338ded2adf41ffd935f00",  # zipformer 0.1.3
}


def _asr_model_structure(module):
    """The joiner's output layer must be a plain one that nobody watches: its logits are never made. Everything else is
    called with the values of ever, so any class will do there.
    """
    if not module.use_transducer:
        return "has no transducer"
    joiner = module.joiner
    reason = check_parameters(module, {}) or unread_code("joiner", joiner, own_forward, _JOINERS)
    if reason:
        return reason
    output = joiner.output_linear
    if upstream_class(output) is not torch.nn.Linear or foreign_forward(output) is not None:
        return "submodule joiner.output_linear is not a plain torch.nn.Linear"
    for name, part in (("joiner", joiner), ("joiner.output_linear", output)):
        if foreign_forward(part) is not None:
            return f"submodule {name} has a forward of its own"
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            return f"submodule {name} has hooks"
    if parametrize.is_parametrized(output):
        return "submodule joiner.output_linear has parametrizations"
    return None


def _upstreams_forward(self, *args, **kwargs):
    return type(self).forward(self, *args, **kwargs)


def _forward_transducer(module):
    return [upstream_class(module).forward_transducer]


SWOOSH_L = Rule(
    name="zipformer.swoosh_l",
    class_name="SwooshL",
    forward=models.SwooshL.forward,
    kernels=("swoosh_l",),
    structure=_swoosh_structure,
    functions=_swoosh_functions,
    known={
        "6f2dee7a835d9f8e6dcef639": _PACKAGE,
        "43926691ea5904af92c73f93": _ICEFALL,  # since pull request 1940: the output has the input's dtype
    },
)

SWOOSH_R = Rule(
    name="zipformer.swoosh_r",
    class_name="SwooshR",
    forward=models.SwooshR.forward,
    kernels=("swoosh_r",),
    structure=_swoosh_structure,
    functions=_swoosh_functions,
    known={
        "336a09ba89d66c7f0cf011e1": _PACKAGE,
        "efb990e8dee97a31a9e9d681": _ICEFALL,  # since pull request 1940
    },
)

ACTIVATION_DROPOUT_AND_LINEAR = Rule(
    name="zipformer.activation_dropout_and_linear",
    class_name="ActivationDropoutAndLinear",
    forward=models.ActivationDropoutAndLinear.forward,
    kernels=("swoosh_linear",),
    structure=_adl_structure,
    functions=_adl_functions,
    known={
        "781e452b79baa27b704fe4c1": _PACKAGE,  # activation SwooshL
        "35132d02a7d6bf2a98a0f1ba": _PACKAGE,  # activation SwooshR
        "23c796cf93a9157ec368b352": _ICEFALL,  # since pull request 1770
        "553d188554ac839c5fbd665f": Known("icefall before pull request 1770", _scheduled_or_no_dropout),
    },
)

BIAS_NORM = Rule(
    name="zipformer.bias_norm",
    class_name="BiasNorm",
    forward=models.BiasNorm.forward,
    kernels=("bias_norm",),
    structure=_bias_norm_structure,
    functions=own_forward,
    known={"9e1dc79eb532fd8122f42674": _BOTH},  # icefall: every version so far
)

BYPASS = Rule(
    name="zipformer.bypass",
    class_name="BypassModule",
    forward=models.BypassModule.forward,
    kernels=("bypass",),
    structure=_bypass_structure,
    functions=own_forward,
    known={"a4edc035344a0e73d0329665": _BOTH},  # icefall: since pull request 1108
)

BALANCER = Rule(
    name="zipformer.balancer",
    class_name="Balancer",
    forward=models.Balancer.forward,
    kernels=("balancer_gradient",),
    structure=_balancer_structure,
    functions=own_forward,
    known=_BALANCERS,
)

WHITEN = Rule(
    name="zipformer.whiten",
    class_name="Whiten",
    forward=models.Whiten.forward,
    kernels=("whitening_gradient",),
    structure=_whiten_structure,
    functions=own_forward,
    known={
        "59f435fe5116d207ed3b2a9d": _PACKAGE,
        "2427f1994408e76d9e722891": _ICEFALL,  # since pull request 1974
        "c3009322678ced8184ee6400": Known("icefall before pull request 1974"),
        "c2821462c174d2086c812d37": Known("icefall between pull requests 1814 and 1841"),
        "f27d60a9ca1403688b23218a": Known("icefall before pull request 1663", _grad_scale_is_a_number),
        "f78c8e3e256cd2088a274bfd": Known("icefall before pull request 1108", _grad_scale_is_a_number),
    },
)

SELF_ATTENTION = Rule(
    name="zipformer.self_attention",
    class_name="SelfAttention",
    forward=models.SelfAttention.forward,
    methods=(("streaming_forward", models.SelfAttention.streaming_forward),),
    compared=("streaming_forward",),
    kernels=("rel_position_attention",),
    structure=_self_attention_structure,
    functions=_forward_and_streaming,
    known={"836323bd78272a27e5e90971": _BOTH},  # icefall: every version so far
)

NONLIN_ATTENTION = Rule(
    name="zipformer.nonlin_attention",
    class_name="NonlinAttention",
    forward=models.NonlinAttention.forward,
    methods=(("streaming_forward", models.NonlinAttention.streaming_forward),),
    compared=("streaming_forward",),
    kernels=("nonlin_attention", "rel_position_attention"),
    structure=_nonlin_attention_structure,
    functions=_forward_and_streaming,
    known={
        "b5ad09c7eb732457b1e70f40": _BOTH,  # icefall: since pull request 1316
        "3f97f9cdb30b3190c5aaaa44": Known("icefall before pull request 1316"),  # other spelling of the thirds
    },
)

ENCODER_LAYER = Rule(
    name="zipformer.encoder_layer",
    class_name="ZipformerEncoderLayer",
    forward=models.ZipformerEncoderLayer.forward,
    methods=(("streaming_forward", models.ZipformerEncoderLayer.streaming_forward),),
    compared=("streaming_forward",),
    kernels=("rel_position_attention",),
    structure=_encoder_layer_structure,
    functions=_forward_and_streaming,
    known={"b72fc595549d7a9dba5a40a1": _PACKAGE},
    shallow=True,
)

ZIPFORMER2_ENCODER_LAYER = replace(
    ENCODER_LAYER,
    class_name="Zipformer2EncoderLayer",
    known={
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

CONVNEXT = Rule(
    name="zipformer.convnext",
    class_name="ConvNeXt",
    forward=models.ConvNeXt.forward,
    kernels=("depthwise_conv2d", "linear", "swoosh_linear"),
    structure=_convnext_structure,
    functions=own_forward,
    known={"a5bcd4f71743691dc267c6ba": _BOTH},  # icefall: since pull request 1180
)

CONV2D_SUBSAMPLING = Rule(
    name="zipformer.conv2d_subsampling",
    class_name="Conv2dSubsampling",
    forward=models.Conv2dSubsampling.forward,
    kernels=("channels_last",),
    structure=_conv2d_subsampling_structure,
    functions=own_forward,
    known={
        "0daf1ced9900d8ed1fe82020": _BOTH,  # icefall: since pull request 1108
        "806777fcc2889d54c4698be2": Known("icefall's zipformer_prompt_asr"),  # says nothing of TorchScript
        "536b01a8fe378cfdf7853b9c": Known("icefall before pull request 1108"),  # nothing of tracing
    },
)

ATTENTION_WEIGHTS = Rule(
    name="zipformer.attention_weights",
    class_name="RelPositionMultiheadAttentionWeights",
    forward=models.RelPositionMultiheadAttentionWeights.forward,
    methods=(("streaming_forward", models.RelPositionMultiheadAttentionWeights.streaming_forward),),
    compared=("streaming_forward",),
    kernels=("rel_position_attention_weights",),
    structure=_attention_weights_structure,
    functions=_forward_and_streaming,
    known={
        "f41130237f56f29288f4eed3": _PACKAGE,
        "82ce9c023898984ea0183483": _ICEFALL,  # since pull request 2086, which converts masks to bool
        "c003313bb3c86b4bef3288c4": Known("icefall since pull request 1974"),  # and its SSL, adapter recipes
        "4ff76c9551040c4aa1a333a7": Known("icefall between pull requests 1814 and 1841"),
        "6598551840ecd27c02bc5532": Known("icefall since pull request 1700"),
        "7688d353a00c386e7fd66c89": Known(
            "icefall before pull request 1700"
        ),  # and its HENT, multijoiner recipes
        "7bde99d2f6dc4fbe627fc4ef": Known("icefall before pull request 1108"),  # says nothing of tracing
        "8817422495e9946f28b068a9": Known("icefall's zipformer_lora"),
        "8a8d0fb3170199a40eeff338": Known("icefall's zipformer_lora before pull request 1974"),
    },
)

CONVOLUTION = Rule(
    name="zipformer.convolution",
    class_name="ConvolutionModule",
    forward=models.ConvolutionModule.forward,
    methods=(("streaming_forward", models.ConvolutionModule.streaming_forward),),
    compared=("streaming_forward",),
    kernels=("gated_depthwise_conv",),
    structure=_convolution_structure,
    functions=_forward_and_streaming,
    known={
        "df95c5ab6f048b58a93ee9ed": _BOTH,  # icefall: since pull request 1316
        "4053a40ef406b863c3dcc02f": _ICEFALL,  # since pull request 2086, which converts masks to bool
        "6c0ecf0385c1b92430724293": Known("icefall before pull request 1316"),  # and in some recipes since
        "4fa18653b036d5169f44cf57": Known("icefall before pull request 1316"),  # other spelling of the halves
        "6d54719e8a05aad902314433": Known("icefall before pull request 1108"),  # says nothing of tracing
    },
)

LINEAR = Rule(
    name="torch.linear",
    class_name="Linear",
    forward=models.Linear.forward,
    kernels=("linear",),
    structure=_linear_structure,
    companion=True,
)

ASR_MODEL = Rule(
    name="zipformer.asr_model",
    class_name="AsrModel",
    forward=_upstreams_forward,
    methods=(("forward_transducer", models.AsrModel.forward_transducer),),
    compared=("forward_transducer",),
    kernels=("rnnt_lattice", "rnnt_joiner", "rnnt_pruned_lattice"),
    structure=_asr_model_structure,
    functions=_forward_transducer,
    known={"2a2c2b84100694a1e6450c86": _PACKAGE},
    shallow=True,
    note="its transducer loss runs without the joiner's logits and without k2; forward is upstream's",
)

RULES = (
    ASR_MODEL,
    ENCODER_LAYER,
    ZIPFORMER2_ENCODER_LAYER,
    SELF_ATTENTION,
    NONLIN_ATTENTION,
    SWOOSH_L,
    SWOOSH_R,
    ACTIVATION_DROPOUT_AND_LINEAR,
    BIAS_NORM,
    BYPASS,
    BALANCER,
    WHITEN,
    CONVNEXT,
    CONV2D_SUBSAMPLING,
    CONVOLUTION,
    ATTENTION_WEIGHTS,
    LINEAR,
)
