# SPDX-License-Identifier: Apache-2.0
"""Rules for NeMo's transducer loss (nemo/collections/asr/modules/rnnt.py and losses/rnnt.py)."""

from torch import nn

from fastasr.swap.forwards import nemo_transducer as models
from fastasr.swap.rule import Known, Rule, Upstream, check_parts, check_sequence, unread_child

_NEMO = Known("nemo_toolkit 3.0")
_LOSS = {"4751c04f6ecf40283434d810": _NEMO}


def _joint_structure(module: Upstream) -> str | None:
    reason = check_parts(module, ("pred", "enc", "joint_net"), optional=("_loss", "_wer"))
    if reason is None:
        dropout = (nn.Dropout,) * (len(module.joint_net._modules) - 2)
        reason = check_sequence(module, "joint_net", (tuple(models.ACTIVATIONS), *dropout, nn.Linear))
    reason = reason or models.why_with_logits(module)
    return reason or (unread_child(module, "_loss", "RNNTLoss", _LOSS) if module.loss is not None else None)


def _loss_structure(module: Upstream) -> str | None:
    name = type(module._loss).__name__
    if name not in models.LOSSES:
        return f"computes {name}, expected {', '.join(models.LOSSES[:-1])} or {models.LOSSES[-1]}"
    if name.startswith("TDT") and getattr(module._loss, "clamp", 0.0) > 0:
        return f"clamps the gradients of a TDT's logits to {module._loss.clamp}"
    return check_parts(module, ("_loss",))


JOINT = Rule(
    name="nemo.fused_joint",
    class_name="RNNTJoint",
    forward=models.nemo_fused_joint,
    kernels=("rnnt_joiner", "rnnt_lattice", "tdt_joiner", "tdt_lattice"),
    structure=_joint_structure,
    known={"8c42313350f958fb7e9163ad": _NEMO},
    leaves=lambda module: {"forward": models.why_with_logits(module) or ""},
    note="the loss without logits; upstream decodes for the word error rate; in training the kernel draws its dropout "
    "itself, see upstream_draws",
)

LOSS = Rule(
    name="nemo.transducer_loss",
    class_name="RNNTLoss",
    forward=models.nemo_transducer_loss,
    kernels=("rnnt_lattice", "tdt_lattice"),
    structure=_loss_structure,
    known=_LOSS,
)

RULES = (JOINT, LOSS)
