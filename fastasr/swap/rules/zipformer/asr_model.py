# SPDX-License-Identifier: Apache-2.0
"""Rules for the recogniser around the encoder: its transducer loss."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from fastasr.models.transducer.transducer_loss import TransducerLoss
from fastasr.swap.rule import Rule, Upstream, check_parameters, own_forward, unread_code, upstream_class
from fastasr.swap.rules.zipformer.versions import ICEFALL, PACKAGE

_JOINERS = {
    "958338ded2adf41ffd935f00"  # zipformer 0.1.3 and icefall
}


def _asr_model_structure(module: Upstream) -> str | None:
    """Our loss computes a joiner of plain parts without its logits, and calls any other joiner. It calls all other
    submodules as upstream's does, so these may have any class.
    """
    if not module.use_transducer:
        return "has no transducer"
    return check_parameters(module, {}) or unread_code("joiner", module.joiner, own_forward, _JOINERS)


def _upstreams_forward(self: Upstream, *args: Any, **kwargs: Any) -> Any:
    return type(self).forward(self, *args, **kwargs)


def _ragged(
    self: Upstream,
    encoder_out: Tensor,
    encoder_out_lens: Tensor,
    y: Upstream,
    y_lens: Tensor,
    prune_range: int = 5,
    am_scale: float = 0.0,
    lm_scale: float = 0.0,
) -> Any:
    """Computes forward_transducer of icefall's models. ``y`` is a k2.RaggedTensor, of which ``values`` and
    ``shape.row_splits(1)`` are read; ``y_lens`` follows from it.
    """
    values, splits = y.values.tolist(), y.shape.row_splits(1).tolist()
    tokens = [values[begin:end] for begin, end in itertools.pairwise(splits)]
    options = prune_range, am_scale, lm_scale
    return TransducerLoss.forward_transducer(self, encoder_out, encoder_out_lens, tokens, *options)


def _forward_transducer(module: Upstream) -> list[Callable]:
    return [upstream_class(module).forward_transducer]


ASR_MODEL = Rule(
    name="zipformer.asr_model",
    class_name="AsrModel",
    forward=_upstreams_forward,
    methods=(("forward_transducer", TransducerLoss.forward_transducer),),
    compared=("forward_transducer",),
    kernels=("rnnt_lattice", "rnnt_joiner", "rnnt_pruned_lattice"),
    structure=_asr_model_structure,
    functions=_forward_transducer,
    known={"2a2c2b84100694a1e6450c86": PACKAGE},
    shallow=True,
    note="its transducer loss runs without the joiner's logits and without k2; forward is upstream's",
)

ICEFALL_MODEL = replace(
    ASR_MODEL,
    name="zipformer.asr_model",
    methods=(("forward_transducer", _ragged),),
    known=dict.fromkeys(  # they spell the context that switches autocast off in three ways
        ("e96fa3faa8136d8968ff0a10", "109e3b3e7e2493302adfe928", "a6b7d6cb864a8e34e22de525"), ICEFALL
    ),
)
