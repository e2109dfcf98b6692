# SPDX-License-Identifier: Apache-2.0
"""NeMo's transducer loss, computed from given logits or by its fused joint, which never holds the logits here."""

import logging
import random
from typing import Any

from torch import Tensor, nn

from fastasr import _left
from fastasr.models.common.attention_dropout import as_upstream
from fastasr.models.common.plain import is_plain, is_plain_named, is_upstreams, own_method
from fastasr.rnnt import lengths, tdt_joiner_loss, tdt_loss
from fastasr.swap.rule import Upstream

LOSSES = ("RNNTLossNumba", "RNNTLossPytorch", "TDTLossNumba", "TDTLossPytorch")
ACTIVATIONS = {nn.ReLU: "relu", nn.Tanh: "tanh"}


def nemo_transducer_loss(
    self: Upstream, log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor
) -> Tensor:
    """Returns what upstream's loss returns for a joint's logits or log-probabilities."""
    core = self._loss
    if not is_plain_named(core, LOSSES, self):
        _left.note(self, "its loss has hooks or another forward")
        return own_method(self)(
            log_probs=log_probs, targets=targets, input_lengths=input_lengths, target_lengths=target_lengths
        )
    targets = targets[:, : log_probs.shape[2] - 1]
    call = targets, input_lengths, target_lengths, core.blank
    tokens = log_probs
    if hasattr(core, "durations"):
        tokens, durations = log_probs.tensor_split((core.blank + 1,), -1)
    if _has_durations(core):
        losses = tdt_loss(tokens, durations, *call, core.durations, core.sigma, "none", **_fastemit(core))
    else:
        clamp = getattr(core, "clamp", 0.0)
        losses = lengths.rnnt_losses("rnnt_loss", tokens, *call, clamp=clamp, **_fastemit(core))
    losses = _scaled(core, losses)
    return losses if self.reduction is None else self.reduce(losses, target_lengths)


def nemo_fused_joint(
    self: Upstream, encoder_outputs: Tensor, decoder_outputs: Tensor | None,
    encoder_lengths: Tensor | None = None, transcripts: Tensor | None = None,
    transcript_lengths: Tensor | None = None, compute_wer: bool = False, keep_hypotheses: bool = False,
) -> Any:  # fmt: skip
    """Returns what upstream's fused joint returns. Upstream's code decodes for the word error rate."""

    def upstream(outputs: Tensor | None) -> Any:
        ends = {"encoder_lengths": encoder_lengths, "transcript_lengths": transcript_lengths}
        options = {"compute_wer": compute_wer, "keep_hypotheses": keep_hypotheses, "transcripts": transcripts}
        # NeMo checks types of keyword arguments only
        return own_method(self)(encoder_outputs=encoder_outputs, decoder_outputs=outputs, **ends, **options)

    given = self.wer, self.loss, encoder_lengths, transcript_lengths
    if decoder_outputs is None or transcripts is None or any(value is None for value in given):
        return upstream(decoder_outputs)  # It computes no loss, or names the missing argument.
    if (reason := why_with_logits(self)) is not None:
        _left.note(self, f"upstream computes the loss from logits: {reason}")
        return upstream(decoder_outputs)
    if as_upstream() and _dropout(self) > 0:
        _left.note(self, "upstream_draws is on: upstream draws the dropout of the joint", level=logging.INFO)
        return upstream(decoder_outputs)
    lm = self.project_prednet(decoder_outputs.mT)
    symbols = min(transcripts.shape[1], lm.shape[1] - 1)
    projected = self.project_encoder(encoder_outputs.mT), lm[:, : symbols + 1], transcripts[:, :symbols]
    batch: Any = *projected, encoder_lengths, transcript_lengths
    # For each of upstream's parts of the batch, a TDT draws whether durations count.
    size = self.fused_batch_size if hasattr(self.loss._loss, "omega") else max(len(lm), 1)
    losses = [_of_part(self, *part) for part in zip(*(x.split(size) for x in batch), strict=True)]
    self.hypotheses = None
    decoded = upstream(None)[1:] if compute_wer or keep_hypotheses else (None, None, None)
    return self.loss.reduce(losses, [transcript_lengths]), *decoded


def why_with_logits(joint: Upstream) -> str | None:
    """Returns why upstream's code must compute this joint's loss; None if it need not."""
    net = joint.joint_net
    if not is_plain(net, nn.Sequential) or len(net) not in (2, 3):
        return f"joint_net is {type(net).__name__}, expected a plain Sequential of 2 or 3 modules"
    classes = tuple(ACTIVATIONS), *[(nn.Dropout,)] * (len(net) - 2), (nn.Linear,)
    for part, kinds in zip(net, classes, strict=True):
        if not is_plain(part, *kinds):
            return f"joint_net holds a {type(part).__name__} that is not a plain {kinds[0].__name__}"
    if not joint.fuse_loss_wer:
        return "fuse_loss_wer is False: the joint returns its logits, from which the loss is computed"
    if joint.masking_prob > 0:
        return (
            f"masking_prob is {joint.masking_prob}, expected none: it hides parts of the prediction network"
        )
    if joint.temperature != 1:
        return f"temperature is {joint.temperature}, expected 1"
    if joint.is_adapter_available():
        return "has adapters between the joint's sum and its activation"
    core = None if joint.loss is None else joint.loss._loss
    if core is not None and getattr(core, "clamp", 0.0) > 0:
        return f"the loss clamps the gradients of its logits to {core.clamp}"
    if core is not None and type(core).__name__ not in LOSSES:
        return f"the loss is a {type(core).__name__}, expected {', '.join(LOSSES[:-1])} or {LOSSES[-1]}"
    expected = joint.joint_net[-1].out_features - len(getattr(core, "durations", ())) - 1
    if core is not None and core.blank != expected:
        return f"blank is {core.blank}, expected the last token, {expected}"
    losses_are_plain = core is None or (
        is_plain_named(core, LOSSES, joint) and is_upstreams(joint.loss, joint)
    )
    if not losses_are_plain:
        return "its loss has hooks or another forward"
    return None


def _dropout(joint: Upstream) -> float:
    dropout = joint.joint_net[1]
    return dropout.p if dropout.training and len(joint.joint_net) == 3 else 0.0


def _of_part(
    self: Upstream, am: Tensor, lm: Tensor, targets: Tensor, frames: Tensor, symbols: Tensor
) -> Tensor:
    """Returns the losses (B,) for projected outputs of the encoder and the prediction network."""
    core, head = self.loss._loss, self.joint_net[-1]
    options: dict[str, Any] = {
        "activation": ACTIVATIONS[type(self.joint_net[0])],
        "dropout_p": _dropout(self),
    }
    options |= _fastemit(core)
    if _has_durations(core):
        of_durations = core.blank, core.durations, core.sigma
        losses = tdt_joiner_loss(
            am, lm, head.weight, head.bias, targets, frames, symbols, *of_durations, "none", **options
        )
    else:
        tokens = slice(core.blank + 1)
        weight, bias = head.weight[tokens], None if head.bias is None else head.bias[tokens]
        losses = lengths.joiner_losses(am, lm, weight, bias, targets, frames, symbols, core.blank, **options)
    return _scaled(core, losses)


def _has_durations(core: Upstream) -> bool:
    """Says whether this call is a TDT's. With the chance omega a TDT is trained as an RNN-T of its tokens."""
    return hasattr(core, "durations") and not (hasattr(core, "omega") and random.uniform(0, 1) < core.omega)


def _fastemit(core: Upstream) -> dict:
    return {"fastemit_lambda": getattr(core, "fastemit_lambda", 0.0)}


def _scaled(core: Upstream, losses: Tensor) -> Tensor:
    """Multiplies values by 1 + λ, as upstream does. The gradients have FastEmit's factor already."""
    return losses + getattr(core, "fastemit_lambda", 0.0) * losses.detach()
