# SPDX-License-Identifier: Apache-2.0
"""The loss of transformers' ParakeetForRNNT and ParakeetForTDT, without the joint's logits."""

import sys
from typing import Any

import torch
from torch import Tensor

from fastasr.models.common.plain import is_plain, is_upstreams
from fastasr.rnnt import lengths, tdt_joiner_loss
from fastasr.swap.rule import Upstream, upstream_class

_LOSSES = "ParakeetForRNNTLoss", "ParakeetForTDTLoss"
_ACTIVATIONS = {"relu": torch.nn.ReLU, "tanh": torch.nn.Tanh}


def with_loss(
    model: Upstream,
    features: Tensor | None,
    mask: Tensor | None,
    decoder_input_ids: Tensor | None,
    encoder_outputs: Upstream,
    labels: Tensor,
    **kwargs: Any,
) -> Any:
    """Returns upstream's output for labels, with None for ``logits``."""
    config, head = model.config, model.joint.head
    if encoder_outputs is None:
        encoder_outputs = model.get_audio_features(input_features=features, attention_mask=mask, **kwargs)
    contexts = model.decoder(decoder_input_ids, cache=None)
    ends = encoder_outputs.attention_mask.sum(-1)
    labels, ends = labels.to(contexts.device), ends.to(contexts.device)
    call = encoder_outputs.pooler_output, contexts, head.weight, head.bias, labels
    if hasattr(config, "durations"):
        symbols = (labels != config.pad_token_id).sum(-1)
        options = kwargs.get("sigma", 0.0), kwargs.get("reduction", "mean"), config.hidden_act
        loss = tdt_joiner_loss(*call, ends, symbols, config.blank_token_id, config.durations, *options)
    else:
        symbols = (labels != config.blank_token_id).sum(-1)
        blank = config.blank_token_id
        losses = lengths.joiner_losses(*call, ends, symbols, blank, activation=config.hidden_act)
        loss = lengths.reduced("rnnt.joiner_loss", losses, symbols, kwargs.get("reduction", "mean_volume"))
    kept = "last_hidden_state", "pooler_output", "hidden_states", "attentions"
    output = sys.modules[upstream_class(model).__module__].ParakeetRNNTOutput
    return output(loss=loss, **{name: getattr(encoder_outputs, name) for name in kept})


def why_with_logits(
    model: Upstream,
    encoder_outputs: Upstream,
    labels: Tensor,
    decoder_cache: Upstream,
    use_decoder_cache: bool | None,
    kwargs: dict[str, Any],
) -> str:
    """Returns why the result of ``with_loss`` for these arguments is not upstream's, apart from the logits, or "" if it
    is."""
    if labels.dim() != 2 or labels.shape[1] == 0:
        return "labels are not (batch, 1 or more)"
    if decoder_cache is not None or use_decoder_cache:
        return "the call uses a decoder cache"
    if isinstance(encoder_outputs, tuple | list):
        return "encoder_outputs are a tuple"
    if kwargs.get("return_dict", model.config.return_dict) is False:
        return "return_dict is False"
    return why_with_logits_always(model)


def why_with_logits_always(model: Upstream) -> str:
    """Returns why no call of this model has its loss by ``with_loss`` now, or ""."""
    head, loss = model.joint.head, model.loss_function
    name, origin = (getattr(loss, a, getattr(type(loss), a)) for a in ("__name__", "__module__"))
    if name not in _LOSSES or not origin.startswith("transformers.loss."):
        return f"loss_function is {origin}.{name}"
    activation = _ACTIVATIONS.get(model.config.hidden_act)
    if activation is None:
        return f"hidden_act is {model.config.hidden_act}, expected relu or tanh"
    if not is_plain(model.joint.activation, activation):
        return f"joint.activation is not a plain {activation.__name__}"
    if not is_plain(head, torch.nn.Linear):
        return "joint.head is not a plain Linear"
    return "" if is_upstreams(model.joint, model) else "joint has hooks or another forward"


def shared(result: Any) -> Any:
    """Returns the part of upstream's output that a forward with labels returns too: all but the logits."""
    if getattr(result, "loss", None) is None:
        return result
    return {name: value for name, value in result.items() if name != "logits"}
