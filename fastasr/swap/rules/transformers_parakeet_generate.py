# SPDX-License-Identifier: Apache-2.0
"""Rules for ``generate`` and the loss of transformers' ParakeetForRNNT and ParakeetForTDT
(transformers/models/parakeet): plain greedy search of float32 models on the CPU runs as one native call after the
encoder, and a forward with labels computes the loss without logits.

``sequences`` and ``durations`` are upstream's, see ``fastasr.models.transducer.parakeet_steps``. Any other request to
``generate`` runs upstream's loop. Upstream takes the largest of all logits for the next token, so the
generation config of a TDT must suppress its durations: without that our search serves too, as long as no duration has
the largest logit.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastasr import _left
from fastasr.models.common.plain import any_watched
from fastasr.models.transducer.parakeet_steps import generate_steps, no_duration_wins
from fastasr.models.transducer.predictors import ParakeetPredictor, release
from fastasr.swap.rule import Known, Rule, Upstream, check_parts, unread_child, upstream_class
from fastasr.swap.rules.transformers_parakeet_loss import (
    shared,
    why_with_logits,
    why_with_logits_always,
    with_loss,
)

# arguments of generate that reach upstream's loop alone
_LOOP = {"assistant_model", "assistant_tokenizer", "custom_generate", "streamer", "synced_gpus", "tokenizer"}
_NO_CACHE = "use_cache is False"
_CRITERIA = {"MaxLengthCriteria", "EncoderExhaustedCriteria"}
_DECODER, _JOINT = {"0eddbad75b6591b64c7adf1c"}, {"77cd1733ed6085f7e3c2b2df"}


def forward(
    self: Upstream,
    input_features: Tensor | None = None,
    attention_mask: Tensor | None = None,
    decoder_input_ids: Tensor | None = None,
    decoder_cache: Upstream = None,
    use_decoder_cache: bool | None = None,
    encoder_outputs: Upstream = None,
    labels: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Computes the loss without logits, or calls upstream's forward. Upstream's generate looks at these names."""
    if labels is not None:
        reason = why_with_logits(self, encoder_outputs, labels, decoder_cache, use_decoder_cache, kwargs)
        if not reason:
            return with_loss(
                self, input_features, attention_mask, decoder_input_ids, encoder_outputs, labels, **kwargs
            )
        _left.note(self, f"the loss is computed from logits: {reason}")
    given = input_features, attention_mask, decoder_input_ids, decoder_cache, use_decoder_cache
    return upstream_class(self).forward(self, *given, encoder_outputs, labels, **kwargs)


def generate(
    self: Upstream, inputs: Tensor | None = None, generation_config: Upstream = None, **kwargs: Any
) -> Any:
    """Prepares everything as upstream does, and runs ``_steps`` in place of upstream's loop."""
    asked = sorted(name for name in _LOOP if kwargs.get(name) is not None)
    if asked:
        _leave(self, f"the call asks for {', '.join(asked)}")
    elif torch.distributed.is_available() and torch.distributed.is_initialized():
        _leave(self, "torch.distributed is initialised")
    else:
        kwargs["custom_generate"] = _steps
    return upstream_class(self).generate(self, inputs, generation_config, **kwargs)


def _leave(model: Upstream, reason: str) -> None:
    _left.note(model, f"upstream's loop runs: {reason}", "generate")


def _steps(
    self: Upstream,
    input_ids: Tensor,
    logits_processor: Upstream,
    stopping_criteria: Upstream,
    generation_config: Upstream,
    **model_kwargs: Any,
) -> Any:
    """Returns (batch, 1 + steps) as upstream's ``_sample`` does, and leaves durations in ``_step_durations``."""
    frames, lengths = model_kwargs["encoder_outputs"].pooler_output, model_kwargs["encoder_valid_lengths"]
    asked = input_ids, logits_processor, stopping_criteria, generation_config, frames
    search, reason = None, _why_not_this_call(self, *asked) or _why_not_any_call(self)
    if not reason:
        predictor = ParakeetPredictor(self)
        search, reason = predictor.find_search()
    if search is not None and not reason:
        most_steps = stopping_criteria.max_length - input_ids.shape[1]
        steps = generate_steps(predictor, search, frames, lengths, input_ids, most_steps)
        if _suppresses_durations(self, logits_processor) or no_duration_wins(self, frames, input_ids, steps):
            self._step_durations.extend(steps.moves.unbind(1))
            return torch.cat((input_ids, steps.tokens), 1)
        reason = "a duration has the largest logit, and the generation config does not suppress durations"
    _leave(self, reason)
    return upstream_class(self)._sample(
        self, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs
    )


def _durations(model: Upstream) -> set[int]:
    """Returns the places of a TDT's durations among the logits."""
    tokens = model.config.vocab_size
    return set(range(tokens, tokens + len(getattr(model.config, "durations", ()))))


def _suppresses_durations(model: Upstream, processors: Upstream) -> bool:
    return _durations(model) <= {token for every in processors for token in every.suppress_tokens.tolist()}


def _why_not_this_call(
    model: Upstream,
    input_ids: Tensor,
    processors: Upstream,
    criteria: Upstream,
    generation_config: Upstream,
    frames: Tensor,
) -> str:
    """Returns the reason why the native search cannot serve a call, or ""."""
    others = {type(p).__name__ for p in processors if not hasattr(p, "suppress_tokens")}
    suppressed = {
        token for p in processors if hasattr(p, "suppress_tokens") for token in p.suppress_tokens.tolist()
    }
    criteria = {type(one).__name__ for one in criteria}
    if others:
        return f"it changes logits by {', '.join(sorted(others))}"
    if not suppressed <= _durations(model):
        return "suppress_tokens has more than the durations"
    if criteria != _CRITERIA:
        return f"it stops by {', '.join(sorted(criteria - _CRITERIA) or ['fewer criteria than upstream'])}"
    if generation_config.return_dict_in_generate and _wants_states(generation_config):
        return "it asks for output_hidden_states or output_attentions"
    if input_ids.shape[1] != 1:
        return "it gives the first tokens"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if not frames.is_cpu or frames.dtype is not torch.float32:
        return f"the encoder's output is {str(frames.dtype).removeprefix('torch.')} on {frames.device.type}"
    if not generation_config.use_cache:
        return _NO_CACHE
    if generation_config.prefill_chunk_size is not None:
        return "prefill_chunk_size is set"
    return "" if frames.shape[1] else "there are no frames"


def _why_not_any_call(model: Upstream) -> str:
    """Returns why no call of this model is searched natively now, as far as that shows without its weights, or ""."""
    if any_watched([model]):
        return "the model has hooks"
    if not hasattr(model.config, "durations") and model.max_symbols_per_step < 1:
        return f"max_symbols_per_step is {model.max_symbols_per_step}, expected at least 1"
    return ""


def _wants_states(generation_config: Upstream) -> bool:
    return bool(generation_config.output_hidden_states or generation_config.output_attentions)


def _leaves(module: Upstream) -> dict[str, str | None]:
    reason = _why_not_any_call(module)
    if getattr(module.generation_config, "use_cache", None) is False:  # None: upstream's default, True
        reason = reason or _NO_CACHE
    reason = reason or ParakeetPredictor(module).why_not_native()
    logits = why_with_logits_always(module)
    return {
        "generate": reason and f"upstream's loop runs: {reason}",
        "forward": logits and f"the loss is computed from logits: {logits}",
    }


def _functions(module: Upstream) -> list[Callable]:
    cls = upstream_class(module)
    prepared = "model_inputs", "generated_length", "cache_for_generation"
    others = (
        cls._get_stopping_criteria,
        cls._update_model_kwargs_for_generation,
        cls.prepare_inputs_for_generation,
    )
    return [cls.forward, cls.generate, *others, *(getattr(cls, f"_prepare_{name}") for name in prepared)]


def _structure(module: Upstream) -> str | None:
    kind = "TDT" if hasattr(module.config, "durations") else "RNNT"
    return (
        check_parts(module, ("encoder", "encoder_projector", "decoder", "joint"))
        or unread_child(module, "decoder", "ParakeetRNNTDecoder", _DECODER)
        or unread_child(module, "joint", f"Parakeet{kind}JointNetwork", _JOINT)
    )


RULES = tuple(
    Rule(
        name=f"transformers.parakeet_{kind.lower()}_generate",
        class_name=f"ParakeetFor{kind}",
        forward=forward,
        methods=(("generate", generate),),
        compared=("generate",),
        kernels=("tdt_joiner", "tdt_lattice") if kind == "TDT" else ("rnnt_joiner", "rnnt_lattice"),
        shared=shared,
        structure=_structure,
        functions=_functions,
        known={new: Known("transformers 5.24"), old: Known("transformers 5.17 to 5.23")},
        shallow=True,
        release=lambda module: release(ParakeetPredictor(module)),
        leaves=_leaves,
        note="generate runs natively for plain greedy search in float32 on the CPU; with labels the loss is computed "
        "without logits, which are None in the output",
    )
    for kind, new, old in (
        ("RNNT", "224ef5956318ebd71462cd6f", "5cbdcdf3b4a18e32c6bd0336"),
        ("TDT", "dd96c0fda3d86c9fcf19e5d0", "f54efa3174e660a462db4b4b"),
    )
)
