# SPDX-License-Identifier: Apache-2.0
"""Rules for attention: its weights and the modules that use them."""

import torch

from fastasr.models import zipformer as models
from fastasr.swap.binding import foreign_forward
from fastasr.swap.rule import (
    Known,
    Rule,
    Upstream,
    check_ints,
    check_parts,
    holds,
    is_rate,
    own_forward,
    unread_code,
    upstream_class,
)
from fastasr.swap.rules.zipformer.versions import (
    BOTH,
    ICEFALL,
    IDENTITIES,
    PACKAGE,
    ZIPVOICE,
    forward_and_streaming,
)

_ATTENTION_WEIGHTS_CHILDREN = (
    "in_proj",
    "linear_pos",
    "balance_keys",
    "whiten_keys",
    "copy_query",
    "copy_pos_query",
)


def _attention_weights_structure(module: Upstream) -> str | None:
    """Our forward calls every submodule as upstream's does, so submodules may have any class."""
    reason = check_parts(module, _ATTENTION_WEIGHTS_CHILDREN, optional=("pos_emb_skip_rate",))
    reason = reason or check_ints(module, ("num_heads", "query_head_dim", "pos_head_dim"))
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


_NONLIN_IDENTITIES = ("identity1", "identity2", "identity3")

_NONLIN_CHILDREN = ("in_proj", "balancer", "tanh", *_NONLIN_IDENTITIES, "out_proj", "whiten1", "whiten2")


def _nonlin_attention_structure(module: Upstream) -> str | None:
    """Our forward does not call the hyperbolic tangent and the identities. It calls the other submodules as upstream's
    does, so these may have any class.
    """
    reason = check_parts(module, _NONLIN_CHILDREN)
    if reason is not None:
        return reason
    if upstream_class(module.tanh) is not torch.nn.Tanh or foreign_forward(module.tanh) is not None:
        return "submodule tanh is not a plain torch.nn.Tanh"
    for name in _NONLIN_IDENTITIES:
        reason = reason or unread_code(name, getattr(module, name), own_forward, IDENTITIES)
    weight = getattr(module.in_proj, "weight", None)
    if reason is None and (weight is None or tuple(weight.shape[:1]) != (3 * module.hidden_channels,)):
        reason = f"in_proj does not give {3 * module.hidden_channels} channels, 3 * hidden_channels"
    return reason


SELF_ATTENTION = Rule(
    name="zipformer.self_attention",
    class_name="SelfAttention",
    forward=models.SelfAttention.forward,
    methods=(("streaming_forward", models.SelfAttention.streaming_forward),),
    compared=("streaming_forward",),
    kernels=("zipformer_attention",),
    # Our forward calls every submodule as upstream's does, so submodules may have any class.
    structure=holds("in_proj", "out_proj", "whiten"),
    functions=forward_and_streaming,
    known={
        "836323bd78272a27e5e90971": BOTH,  # icefall: every version so far
        "2edbaa7f109f1a6a0b584d22": ZIPVOICE,
    },
)

NONLIN_ATTENTION = Rule(
    name="zipformer.nonlin_attention",
    class_name="NonlinAttention",
    forward=models.NonlinAttention.forward,
    methods=(("streaming_forward", models.NonlinAttention.streaming_forward),),
    compared=("streaming_forward",),
    kernels=("nonlin_attention", "zipformer_attention"),
    structure=_nonlin_attention_structure,
    functions=forward_and_streaming,
    known={
        "b5ad09c7eb732457b1e70f40": BOTH,  # icefall: since pull request 1316
        "60ad6eb8427d2c7ea7d025d5": ZIPVOICE,
        "3f97f9cdb30b3190c5aaaa44": Known("icefall before pull request 1316"),  # other spelling of the thirds
    },
)

ATTENTION_WEIGHTS = Rule(
    name="zipformer.attention_weights",
    class_name="RelPositionMultiheadAttentionWeights",
    forward=models.RelPositionMultiheadAttentionWeights.forward,
    methods=(("streaming_forward", models.RelPositionMultiheadAttentionWeights.streaming_forward),),
    compared=("streaming_forward",),
    kernels=("zipformer_attention_weights",),
    structure=_attention_weights_structure,
    functions=forward_and_streaming,
    known={
        "f41130237f56f29288f4eed3": PACKAGE,
        "62168f22e83f307eef3b018d": ZIPVOICE,
        "82ce9c023898984ea0183483": ICEFALL,  # since pull request 2086, which converts masks to bool
        "c003313bb3c86b4bef3288c4": Known("icefall since pull request 1974"),  # and its SSL, adapter recipes
        "4ff76c9551040c4aa1a333a7": Known("icefall between pull requests 1814 and 1841"),
        "6598551840ecd27c02bc5532": Known("icefall since pull request 1700"),
        # also in its HENT and multijoiner recipes
        "7688d353a00c386e7fd66c89": Known("icefall before pull request 1700"),
        "7bde99d2f6dc4fbe627fc4ef": Known("icefall before pull request 1108"),  # says nothing of tracing
        "8817422495e9946f28b068a9": Known("icefall's zipformer_lora"),
        "8a8d0fb3170199a40eeff338": Known("icefall's zipformer_lora before pull request 1974"),
    },
)
