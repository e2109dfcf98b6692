# SPDX-License-Identifier: Apache-2.0
"""SpeechBrain's searches of Transformers, and the Transformer language model that their scorer asks.

Upstream computes the language model for all tokens so far at every step, and the logits of all of them. A search reads
those of the last tokens alone: while it runs they alone are computed. Keys and values of earlier tokens are kept, and
found again by the tokens.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastasr.models.common import layer_products
from fastasr.models.common.packed_layers import may_call
from fastasr.models.common.plain import is_plain, is_plain_named
from fastasr.swap.forwards import ctc_scorers, searches
from fastasr.swap.forwards.decoder_step import MOST_ROWS, Names, later, products_of, steps_of
from fastasr.swap.rule import Upstream, upstream_forward
from fastasr.swap.source_hash import SourceUnavailable, fingerprint

_NAMES = Names(
    "self_att.att",
    "norm1.norm",
    "",
    "",
    "pos_ffn.ffn.0",
    "pos_ffn.ffn.1",
    "pos_ffn.ffn.3",
    "norm2.norm",
    (),
    "head_dim",
    "normalize_before",
)
# Methods of a scorer and of a model whose results for a token depend on the last layer's results for it alone, and the
# fingerprints of their code
_READERS = {"score": "03e60163fe35c912084603fd", "decode": "44651f6e2bffe751ed3971b3"}
_PADDING = 0  # upstream hides this token


def search(self: Upstream, *args: Any, **kwargs: Any) -> Any:
    """Serves the greedy search and the beam search of Transformers."""
    builder = getattr(self, "scorer", None)
    # A user's builder may have none of these.
    parts = (getattr(builder, name, {}) for name in ("full_scorers", "partial_scorers"))
    scorers = [scorer for part in parts for scorer in part.values()]
    last = [scorer.lm for scorer in scorers if _reads_tokens_alone(scorer, "score")]
    if _reads_tokens_alone(self.model, "decode") and _scores_tokens_alone(self):
        last.append(self.model.decoder)
    with searches.running(last), ctc_scorers.served(scorers):
        return upstream_forward(self, *args, **kwargs)


def _reads_tokens_alone(owner: Any, method: str) -> bool:
    """Says whether this method is upstream's, which reads the result of each token alone."""
    cls = type(owner)
    if method in vars(owner) or not hasattr(cls, method):
        return False
    try:
        return fingerprint([getattr(cls, method)], cls) == _READERS[method]
    except SourceUnavailable:
        return False


def _scores_tokens_alone(self: Upstream) -> bool:
    """Says whether a search's last layer is linear, and nobody sees for how many tokens it is called."""
    linear = all(is_plain_named(part, ("Linear",), self) for part in self.fc.modules())
    return linear and is_plain(self.softmax, torch.nn.LogSoftmax)


class _Tokens(NamedTuple):
    """Those of the last step (R, T), and their keys and values (R, T, width) in each layer."""

    ids: Tensor
    keys: list[Tensor]
    values: list[Tensor]


class _Search:
    tokens: _Tokens | None = None

    def before(self, ids: Tensor, layers: int, width: int) -> _Tokens | None:
        """Returns the earlier ones of the tokens (R, T), or None if they were not in the last step."""
        kept, earlier = self.tokens, ids[:, :-1]
        if not earlier.numel():
            none = [torch.empty(len(ids), 0, width, dtype=torch.float32, device="cpu")] * layers
            return _Tokens(earlier, none, none)
        if kept is None or kept.ids.shape[1:] != earlier.shape[1:]:
            return None
        same = (earlier[:, None] == kept.ids).all(2)
        if not same.any(1).all():
            return None
        rows = same.to(torch.uint8).argmax(1)
        keys, values = ([t.index_select(0, rows) for t in part] for part in kept[1:])
        return _Tokens(earlier, keys, values)


def language_model(self: Upstream, src: Tensor) -> Tensor:
    """Serves ``TransformerLM``: tokens (R, T) -> logits (R, T, vocabulary); in a search those of the last token
    (R, 1, vocabulary)."""
    found = _last_token(self, src) if searches.reads_last_token(self) else None
    if found is None:
        y: Tensor = upstream_forward(self, src)
        return y
    return found


def _last_token(self: Upstream, ids: Tensor) -> Tensor | None:
    layers = self.encoder.layers if self.num_encoder_layers and not self.num_decoder_layers else ()
    fits = ids.dim() == 2 and ids.is_cpu and 0 < len(ids) <= MOST_ROWS and ids.shape[1] > 0
    if not layers or not fits or bool((ids == _PADDING).any()):
        return None
    if self.encoder.output_hidden_states or type(self.positional_encoding).__name__ != "PositionalEncoding":
        return None
    x = self.custom_src_module(ids[:, -1:])
    x = x if self.embedding_proj is None else self.embedding_proj(x)
    x = x + self.positional_encoding(ids[..., None])[:, -1:]
    steps = steps_of(self, layers, _by_modules, _NAMES)
    if steps is None or not may_call(self, x, layers[0].norm1.norm.weight):
        return None
    products = products_of(steps, x)
    found: _Search | None = searches.kept(self, (*steps, layer_products.key()), _Search)
    before = None if found is None else found.before(ids, len(steps), x.shape[2])
    if found is None or before is None or products is None:
        return None
    keys, values = [], []
    for step, product, *kept in zip(steps, products, *before[1:], strict=True):
        q, *new = (t.view(x.shape) for t in step.projections(product, x))
        both = [torch.cat(pair, 1) for pair in zip(kept, new, strict=True)]
        (x,) = step.result(product, x, q, *map(step.in_heads, both), None, None, None, None)
        keys.append(both[0])
        values.append(both[1])
    found.tokens = _Tokens(ids.clone(), keys, values)
    y: Tensor = self.output_proj(self.encoder.norm(x))
    return y


def _by_modules(layer: Upstream, x: Tensor) -> Tensor:
    y: Tensor = type(layer).forward(layer, x, later(x))[0]
    return y[:, 1:]
