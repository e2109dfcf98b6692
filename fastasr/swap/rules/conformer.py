# SPDX-License-Identifier: Apache-2.0
"""The rules for the Conformers of all frameworks share this: the ops that our forwards of its modules call, and the
rule for layers that leave padding out."""

from collections.abc import Callable
from functools import partial

from fastasr.models.fast_conformer.attention import release
from fastasr.swap.forwards import layers
from fastasr.swap.forwards.beams import attention_to_frames
from fastasr.swap.forwards.decoder_step import STEPS
from fastasr.swap.rule import Known, Ragged, Rule, check_parameters

FROM_5_18 = Known("transformers 5.18 to 5.24")
attention_rule = partial(Rule, kernels=("linear", "rel_attention"), release=release)
_CONVOLUTION = ("linear", "gated_depthwise_conv")
convolution_rule = partial(Rule, kernels=(*_CONVOLUTION, "batch_norm_activation"))
norm_convolution_rule = partial(Rule, kernels=(*_CONVOLUTION, "norm_activation"))
either_convolution_rule = partial(Rule, kernels=(*_CONVOLUTION, "batch_norm_activation", "norm_activation"))
DROPS = "in training on a GPU the kernel draws the dropout between the layers itself, see upstream_draws"
feed_forward_rule = partial(Rule, kernels=("linear_activation", "linear"), note=DROPS)


decoder_rule = partial(
    Rule,
    forward=attention_to_frames,
    note="upstream's code, which projects an encoder's frames once for all steps and beams of a search",
)
decoder_layer_rule = partial(
    Rule,
    shallow=True,
    release=STEPS.release,
    note="on a CPU one token of a search in two native calls, else upstream's code",
)


def layer_rule(name: str, class_name: str, forward: Callable, known: dict[str, Known]) -> Rule:
    """Returns the rule for a layer that ``accelerate(ragged=True)`` binds."""
    return Rule(
        name=name,
        class_name=class_name,
        forward=forward,
        structure=lambda module: check_parameters(module, {}),
        known=known,
        companion=True,
        ragged=Ragged(forward, layers.why_not),
        note="bound by ragged=True alone",
    )
