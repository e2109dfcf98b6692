# SPDX-License-Identifier: Apache-2.0
"""Rules for ``generate`` and the loss of transformers' ParakeetForRNNT and ParakeetForTDT
(transformers/models/parakeet): plain greedy search of float32 models on the CPU runs as one native call after the
encoder, and a forward with labels computes the loss without logits.

``sequences`` and ``durations`` are upstream's, see ``fastasr.decoding.parakeet_generate``. Whatever else ``generate``
is asked for runs upstream's loop.
"""

import torch

from fastasr.decoding.looping_transducers import Parakeet, Unserved, release
from fastasr.decoding.parakeet_generate import steps_of_generate
from fastasr.models.common.inference import any_hooked
from fastasr.swap.rule import Known, Rule, check_child_names, check_parameters, unread_child, upstream_class
from fastasr.swap.rules.transformers_parakeet_loss import serves, shared, with_loss

# arguments of generate that reach upstream's loop alone
_LOOP = {"assistant_model", "assistant_tokenizer", "custom_generate", "streamer", "synced_gpus", "tokenizer"}
_CRITERIA = {"MaxLengthCriteria", "EncoderExhaustedCriteria"}
_DECODER, _JOINT = {"0eddbad75b6591b64c7adf1c"}, {"77cd1733ed6085f7e3c2b2df"}


def forward(
    self,
    input_features=None,
    attention_mask=None,
    decoder_input_ids=None,
    decoder_cache=None,
    use_decoder_cache=None,
    encoder_outputs=None,
    labels=None,
    **kwargs,
):
    """Computes the loss without logits, or calls upstream's forward. Upstream's generate looks at these names."""
    if serves(self, encoder_outputs, labels, decoder_cache, use_decoder_cache, kwargs):
        return with_loss(
            self, input_features, attention_mask, decoder_input_ids, encoder_outputs, labels, **kwargs
        )
    given = input_features, attention_mask, decoder_input_ids, decoder_cache, use_decoder_cache
    return upstream_class(self).forward(self, *given, encoder_outputs, labels, **kwargs)


def generate(self, inputs=None, generation_config=None, **kwargs):
    """Prepares everything as upstream does, and runs ``_steps`` in place of upstream's loop."""
    plain = all(kwargs.get(name) is None for name in _LOOP)
    if plain and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        kwargs["custom_generate"] = _steps
    return upstream_class(self).generate(self, inputs, generation_config, **kwargs)


def _steps(self, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    """Returns (batch, 1 + steps), what upstream's ``_sample`` returns, and leaves durations in ``_step_durations``."""
    looping = _looping(self, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
    if looping is None:
        return upstream_class(self)._sample(
            self, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs
        )
    frames, lengths = model_kwargs["encoder_outputs"].pooler_output, model_kwargs["encoder_valid_lengths"]
    most_steps = stopping_criteria.max_length - input_ids.shape[1]
    steps = steps_of_generate(Parakeet(self), looping, frames, lengths, input_ids, most_steps)
    self._step_durations.extend(steps.moves.unbind(1))
    return torch.cat((input_ids, steps.tokens), 1)


def _looping(model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs):
    """Returns the native search if this is plain greedy search that it serves, else None."""
    frames, tokens = model_kwargs["encoder_outputs"].pooler_output, model.config.vocab_size
    durations = len(getattr(model.config, "durations", ()))
    suppressed = [getattr(processor, "suppress_tokens", torch.tensor([-1])) for processor in logits_processor]
    plain = (
        {token for every in suppressed for token in every.tolist()} == set(range(tokens, tokens + durations))
        and {type(criteria).__name__ for criteria in stopping_criteria} == _CRITERIA
        and generation_config.use_cache
        and generation_config.prefill_chunk_size is None
        and not (generation_config.return_dict_in_generate and _wants_states(generation_config))
        and input_ids.shape[1] == 1
        and (durations or model.max_symbols_per_step >= 1)
        and not torch.is_autocast_enabled("cpu")
        and not any_hooked([model])
        and frames.is_cpu
        and frames.dtype is torch.float32
        and frames.shape[1] > 0
    )
    try:
        looping = Parakeet(model).looping() if plain else None
    except Unserved:
        return None
    return looping if looping is not None and not looping.reason else None


def _wants_states(generation_config) -> bool:
    return bool(generation_config.output_hidden_states or generation_config.output_attentions)


def _functions(module):
    cls = upstream_class(module)
    prepared = "model_inputs", "generated_length", "cache_for_generation"
    others = (
        cls._get_stopping_criteria,
        cls._update_model_kwargs_for_generation,
        cls.prepare_inputs_for_generation,
    )
    return [cls.forward, cls.generate, *others, *(getattr(cls, f"_prepare_{name}") for name in prepared)]


def _structure(module):
    kind = "TDT" if hasattr(module.config, "durations") else "RNNT"
    return (
        check_parameters(module, {})
        or check_child_names(module, ("encoder", "encoder_projector", "decoder", "joint"))
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
        release=lambda module: release(Parakeet(module)),
        note="generate runs natively for plain greedy search in float32 on the CPU; with labels the loss is computed "
        "without logits, which are None in the output",
    )
    for kind, new, old in (
        ("RNNT", "224ef5956318ebd71462cd6f", "5cbdcdf3b4a18e32c6bd0336"),
        ("TDT", "dd96c0fda3d86c9fcf19e5d0", "f54efa3174e660a462db4b4b"),
    )
)
