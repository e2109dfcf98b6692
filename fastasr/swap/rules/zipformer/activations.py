# SPDX-License-Identifier: Apache-2.0
"""Swoosh activations, alone and with dropout and a linear layer.

icefall's Swoosh classes call k2, whose backward pass rounds the derivative to 8 bits at random; ours is exact.
"""

from collections.abc import Callable
from dataclasses import replace

from fastasr.models import zipformer as models
from fastasr.swap.rule import (
    Known,
    Rule,
    Upstream,
    check_children,
    check_parameters,
    check_rates,
    own_forward,
)
from fastasr.swap.rules.zipformer.versions import ICEFALL, PACKAGE, ZIPVOICE


def swoosh_functions(module: Upstream) -> list[Callable]:
    """Returns the functions to fingerprint. icefall calls k2 by name; the package keeps its function in ``func``."""
    return own_forward(module) + ([module.func] if hasattr(module, "func") else [])


def _swoosh_structure(module: Upstream) -> str | None:
    return check_parameters(module, {}) or check_children(module, {})


def _adl_functions(module: Upstream) -> list[Callable]:
    extra = [getattr(module, name) for name in ("forward_func", "backward_func") if hasattr(module, name)]
    return own_forward(module) + extra


def _adl_structure(module: Upstream) -> str | None:
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
    if reason := check_rates(module, ("dropout_p",)):
        return reason
    shared = module.dropout_shared_dim
    if shared is not None and not isinstance(shared, int):
        return f"dropout_shared_dim is {shared!r}, expected an int or None"
    return None


def _name(function: Callable) -> str:
    inner = getattr(function, "_torchdynamo_orig_callable", function)
    return getattr(inner, "__name__", type(inner).__name__)


def _draws_in_training(module: Upstream) -> str | None:
    return "without k2 upstream's draws random numbers in training; in ZipVoice it acts on the time alone"


def _scheduled_or_no_dropout(module: Upstream) -> str | None:
    """Returns a reason if the dropout rate, a number or a schedule, is not 0 in eval mode: before icefall's pull
    request 1770 it acted there too.
    """
    if getattr(module.dropout_p, "default", module.dropout_p) != 0:
        return "this version of the class applies dropout_p in eval mode too"
    return None


SWOOSH_L = Rule(
    name="zipformer.swoosh_l",
    class_name="SwooshL",
    forward=models.SwooshL.forward,
    kernels=("swoosh_l",),
    structure=_swoosh_structure,
    functions=swoosh_functions,
    known={
        "6f2dee7a835d9f8e6dcef639": PACKAGE,
        "43926691ea5904af92c73f93": ICEFALL,  # since pull request 1940: the output has the input's dtype
        "cd4a23f30f2318794f81a711": replace(ZIPVOICE, condition=_draws_in_training),
    },
)

SWOOSH_R = Rule(
    name="zipformer.swoosh_r",
    class_name="SwooshR",
    forward=models.SwooshR.forward,
    kernels=("swoosh_r",),
    structure=_swoosh_structure,
    functions=swoosh_functions,
    known={
        "336a09ba89d66c7f0cf011e1": PACKAGE,
        "efb990e8dee97a31a9e9d681": ICEFALL,  # since pull request 1940
        "f539c0774209e1456a203bb2": replace(ZIPVOICE, condition=_draws_in_training),
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
        "781e452b79baa27b704fe4c1": PACKAGE,  # activation SwooshL
        "35132d02a7d6bf2a98a0f1ba": PACKAGE,  # activation SwooshR
        "23c796cf93a9157ec368b352": ICEFALL,  # since pull request 1770
        "3eab76849c2aa6a886321bff": replace(ZIPVOICE, condition=_scheduled_or_no_dropout),
        "553d188554ac839c5fbd665f": Known("icefall before pull request 1770", _scheduled_or_no_dropout),
    },
)
