# SPDX-License-Identifier: Apache-2.0
"""The rules for the Conformers of all frameworks share this: the ops that our forwards of its modules call."""

from functools import partial

from fastasr.models.fast_conformer.attention import release
from fastasr.swap.rule import Rule

attention_rule = partial(Rule, kernels=("linear", "rel_attention"), release=release)
convolution_rule = partial(Rule, kernels=("linear", "gated_depthwise_conv"))
norm_convolution_rule = partial(Rule, kernels=("linear", "gated_depthwise_conv", "norm_activation"))
feed_forward_rule = partial(Rule, kernels=("linear_activation", "linear"))
