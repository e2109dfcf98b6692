# SPDX-License-Identifier: Apache-2.0
"""Rules for Balancer and Whiten, which act on gradients alone."""

from dataclasses import replace

from fastasr.models import zipformer as models
from fastasr.swap.rule import Known, Rule, Upstream, check_children, check_ints, check_parameters, check_rates
from fastasr.swap.rules.zipformer.versions import ICEFALL, PACKAGE, ZIPVOICE

# Inference leaves the balancers out, because these versions return their input if it needs no gradient.
BALANCERS = {
    "11eb10d0735c5e5c3fea5f1a": PACKAGE,
    "5b8544f975686064be524bb7": ICEFALL,  # since pull request 1974
    "94b142634dc8a2057f896839": ZIPVOICE,
    "5e2cd40d81ed3f21460c0365": Known("icefall before pull request 1974"),
    "ea1e082139b9f1b7c8175862": Known("icefall before pull request 1108"),  # and its zipformer_prompt_asr
}

_BALANCER_LIMITS = ("prob", "min_positive", "max_positive", "min_abs", "max_abs", "grad_scale")


def _balancer_structure(module: Upstream) -> str | None:
    reason = check_parameters(module, {})
    reason = reason or check_children(module, dict.fromkeys(_BALANCER_LIMITS, "ScheduledFloat"))
    reason = reason or check_rates(module, _BALANCER_LIMITS)
    return reason or check_ints(module, ("num_channels", "channel_dim"))


def _whiten_structure(module: Upstream) -> str | None:
    limits = ("whitening_limit", "grad_scale")
    reason = check_parameters(module, {}) or check_children(module, dict.fromkeys(limits, "ScheduledFloat"))
    reason = reason or check_rates(module, (*limits, "prob", "min_prob", "max_prob"))
    return reason or check_ints(module, ("num_groups",))


def _grad_scale_is_a_number(module: Upstream) -> str | None:
    """Returns a reason if grad_scale is a schedule: these versions multiply a tensor by it, which a schedule cannot
    do."""
    if isinstance(module.grad_scale, (int, float)):
        return None
    return f"grad_scale is a {type(module.grad_scale).__name__}, which this version of the class cannot use"


# The versions of Whiten that our convolution module leaves out in inference.
WHITENS = {
    "59f435fe5116d207ed3b2a9d": PACKAGE,
    "2427f1994408e76d9e722891": ICEFALL,  # since pull request 1974
    "d8898cd7fa5dd75f19804b8b": replace(ZIPVOICE, condition=_grad_scale_is_a_number),
    "c3009322678ced8184ee6400": Known("icefall before pull request 1974"),
    "f27d60a9ca1403688b23218a": Known("icefall before pull request 1663", _grad_scale_is_a_number),
    # and its zipformer_prompt_asr
    "f78c8e3e256cd2088a274bfd": Known("icefall before pull request 1108", _grad_scale_is_a_number),
}

BALANCER = Rule(
    name="zipformer.balancer",
    class_name="Balancer",
    forward=models.Balancer.forward,
    kernels=("balancer_gradient",),
    structure=_balancer_structure,
    known=BALANCERS,
)

WHITEN = Rule(
    name="zipformer.whiten",
    class_name="Whiten",
    forward=models.Whiten.forward,
    kernels=("whitening_gradient",),
    structure=_whiten_structure,
    known=WHITENS | {"c2821462c174d2086c812d37": Known("icefall between pull requests 1814 and 1841")},
)
