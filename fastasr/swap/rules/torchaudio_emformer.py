# SPDX-License-Identifier: Apache-2.0
"""Rules for torchaudio: the Emformer and its layers (torchaudio.models.emformer)."""

import torch

from fastasr.models import emformer as models
from fastasr.models.emformer import packed_step
from fastasr.swap.rule import Known, Rule, check_children, check_parameters, unread_code, upstream_class

_TORCHAUDIO = Known("torchaudio 2.11.0")
_HIDDEN = -1e4  # hidden keys are left out, so their weights must be 0

_ATTENTION = {"ee6e05a72cb08b4553be1888"}  # _EmformerAttention: forward and infer


def _functions(module):
    cls = upstream_class(module)
    return [cls.forward, cls.infer]


def _attention_structure(module):
    reason = check_parameters(module, {}) or check_children(
        module, dict.fromkeys(("emb_to_key_value", "emb_to_query", "out_proj"), "Linear")
    )
    if reason is None and abs(module.scaling - (module.input_dim // module.num_heads) ** -0.5) > 1e-12:
        reason = f"scaling is {module.scaling}, expected 1 / sqrt({module.input_dim // module.num_heads})"
    if reason is None and module.negative_inf > _HIDDEN:
        reason = f"negative_inf is {module.negative_inf}, expected at most {_HIDDEN:g}"
    return reason


_FEED_FORWARD = ("LayerNorm", "Linear", None, "Dropout", "Linear", "Dropout")  # None: it is called


def _feed_forward_structure(module):
    names = [upstream_class(part).__name__ for part in module]
    same = len(names) == len(_FEED_FORWARD) and all(
        wanted in (None, name) for name, wanted in zip(names, _FEED_FORWARD, strict=False)
    )
    return None if same else f"is {', '.join(names)}"


def _hooks(module):
    """Returns a reason if a part has hooks and our forward reads its parameters without calling it, else None."""
    for name, part in module.named_modules():
        used = isinstance(part, torch.nn.Linear | torch.nn.LayerNorm | torch.nn.Sequential)
        if (used or part is module.attention) and (
            part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        ):
            return f"submodule {name} has hooks"
    return None


_LAYER_CHILDREN = {
    "attention": "_EmformerAttention",
    "dropout": "Dropout",
    "memory_op": "AvgPool1d",
    "pos_ff": "Sequential",
    "layer_norm_input": "LayerNorm",
    "layer_norm_output": "LayerNorm",
}


def _layer_structure(module):
    reason = check_parameters(module, {}) or check_children(module, _LAYER_CHILDREN) or _hooks(module)
    for name, check in (("attention", _attention_structure), ("pos_ff", _feed_forward_structure)):
        part = reason is None and check(getattr(module, name))
        reason = f"submodule {name}: {part}" if part else reason
    reason = reason or unread_code("attention", module.attention, _functions, _ATTENTION)
    for name in ("segment_length", "left_context_length", "max_memory_size"):
        if reason is None and not isinstance(getattr(module, name), int):
            reason = f"{name} is {getattr(module, name)!r}, expected an int"
    return reason


def _emformer_structure(module):
    return check_parameters(module, {}) or check_children(
        module, {"memory_op": "AvgPool1d", "emformer_layers": "ModuleList"}
    )


EMFORMER = Rule(
    name="torchaudio.emformer",
    class_name="Emformer",
    forward=models.Emformer.forward,
    methods=(("infer", models.Emformer.infer),),
    structure=_emformer_structure,
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
    leaves=lambda module: {"infer": packed_step.why_not(module)},
)

RULES = (EMFORMER, LAYER)
