# SPDX-License-Identifier: Apache-2.0
"""Rules for torchaudio: the Emformer and its layers (torchaudio.models.emformer)."""

from collections.abc import Callable

from fastasr.models import emformer as models
from fastasr.models.emformer import packed_step
from fastasr.swap.rule import (
    Known,
    Rule,
    Upstream,
    check_ints,
    check_parts,
    holds,
    unread_code,
    upstream_class,
)
from fastasr.swap.rules.conformer import DROPS

_TORCHAUDIO = Known("torchaudio 2.11")
_HIDDEN = -1e4  # hidden keys are left out, so their weights must be 0

_ATTENTION = {"ee6e05a72cb08b4553be1888"}  # _EmformerAttention: forward and infer


def _functions(module: Upstream) -> list[Callable]:
    cls = upstream_class(module)
    return [cls.forward, cls.infer]


def _attention_structure(module: Upstream) -> str | None:
    """Our forward calls every submodule that is no plain layer of torch's, so submodules may have any class."""
    reason = check_parts(module, ("emb_to_key_value", "emb_to_query", "out_proj"))
    if reason is None and abs(module.scaling - (module.input_dim // module.num_heads) ** -0.5) > 1e-12:
        reason = f"scaling is {module.scaling}, expected 1 / sqrt({module.input_dim // module.num_heads})"
    if reason is None and module.negative_inf > _HIDDEN:
        reason = f"negative_inf is {module.negative_inf}, expected at most {_HIDDEN:g}"
    return reason


_LAYER_CHILDREN = ("attention", "dropout", "memory_op", "pos_ff", "layer_norm_input", "layer_norm_output")


def _layer_structure(module: Upstream) -> str | None:
    reason = check_parts(module, _LAYER_CHILDREN)
    part = reason is None and _attention_structure(module.attention)
    reason = f"submodule attention: {part}" if part else reason
    reason = reason or unread_code("attention", module.attention, _functions, _ATTENTION)
    return reason or check_ints(module, ("segment_length", "left_context_length", "max_memory_size"))


EMFORMER = Rule(
    name="torchaudio.emformer",
    class_name="Emformer",
    forward=models.Emformer.forward,
    methods=(("infer", models.Emformer.infer),),
    structure=holds("memory_op", "emformer_layers"),
    functions=_functions,
    known={"9a732b1ee374cdf1861f66e6": _TORCHAUDIO},
    note="makes no attention mask",
)

LAYER = Rule(
    name="torchaudio.emformer_layer",
    class_name="_EmformerLayer",
    forward=models.EmformerLayer.forward,
    methods=(("infer", models.EmformerLayer.infer),),
    kernels=("linear", "segment_attention", "residual_norm"),
    structure=_layer_structure,
    functions=_functions,
    known={"388c08759cc7cf3b15a6b694": _TORCHAUDIO},
    companion=True,
    note=DROPS,
    leaves=lambda module: {"infer": packed_step.why_not(module)},
)

RULES = (EMFORMER, LAYER)
