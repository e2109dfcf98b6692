# SPDX-License-Identifier: Apache-2.0
"""A token of each hypothesis through a layer of transformers' decoders in inference on a CPU, in two native calls.

csrc/bindings/decoder_layer.cpp computes the layer's norms, products and both attentions on the layer's own weights, or
on their copies in fewer bits. Between the calls upstream's cache gets the token's keys and values. Python and torch's
dispatcher take as long as a small model's products. Upstream's code serves all other calls: the prompt, whose tokens
are many, and calls with another cache, gradients, hooks or autocast.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastasr import _left
from fastasr.models.common import layer_products, plumbing
from fastasr.models.common.activations import fused_name
from fastasr.models.common.layer_products import Products
from fastasr.models.common.packed_layers import PackedLayer, PackedLayers, may_call
from fastasr.models.common.plain import is_plain, weight_and_bias
from fastasr.models.fast_conformer.attention import STANDARD
from fastasr.models.fast_conformer.masks import implementation
from fastasr.ops import _activation, _reduced_weights
from fastasr.swap.forwards.transformers_cache import SharedRows
from fastasr.swap.rule import Upstream, upstream_class

_native = torch.ops.fastasr_cpu
MOST_ROWS = 64  # With more rows, the time between products is a small part.
# The arguments that callers give by position
_ARGUMENTS = "attention_mask", "encoder_hidden_states", "encoder_attention_mask"
_MASKS = "attention_mask", "encoder_attention_mask"
_UNREAD = ("use_cache", "position_ids", "encoder_position_ids", "cache_position")  # for one token


class Names(NamedTuple):
    """The names of a layer's parts."""

    own: str  # attention to earlier tokens
    own_norm: str
    frames: str  # attention to the encoder's frames
    frames_norm: str
    first: str  # the products of the feed-forward block
    activation: str
    second: str
    last_norm: str


_WHISPER = Names(
    "self_attn",
    "self_attn_layer_norm",
    "encoder_attn",
    "encoder_attn_layer_norm",
    "fc1",
    "activation_fn",
    "fc2",
    "final_layer_norm",
)
_SEAMLESS = Names(
    "self_attn",
    "self_attn_layer_norm",
    "cross_attention",
    "cross_attention_layer_norm",
    "ffn.fc1",
    "ffn.act",
    "ffn.fc2",
    "ffn_layer_norm",
)
_CANARY = Names(
    "self_attn",
    "input_layernorm",
    "encoder_attn",
    "post_attention_layernorm",
    "mlp.fc1",
    "mlp.activation_fn",
    "mlp.fc2",
    "final_layernorm",
)
_ROTARY = "MoonshineDecoderLayer", "MoonshineStreamingDecoderLayer"  # whose feed-forward blocks are gated too
_NAMES = {
    "WhisperDecoderLayer": _WHISPER,
    "Speech2TextDecoderLayer": _WHISPER,
    "SeamlessM4TDecoderLayer": _SEAMLESS,
    "SeamlessM4Tv2DecoderLayer": _SEAMLESS,
    "CanaryDecoderLayer": _CANARY,
    "CohereAsrDecoderLayer": _CANARY,
} | dict.fromkeys(_ROTARY, _CANARY)


def names_of(layer: Upstream) -> Names:
    return _NAMES[upstream_class(layer).__name__]


def decoder_layer(self: Upstream, hidden_states: Tensor, *others: Any, **kwargs: Any) -> Any:
    """Serves the layers in ``_NAMES``: hidden states (R, T, width), masks (R or 1, 1, T, K), the encoder's frames
    (R, K, width) and an ``EncoderDecoderCache`` -> (R, T, width)."""
    upstream = partial(type(self).forward, self)
    kept = _kept_frames(self, hidden_states, others, kwargs)
    if kept is None:
        return upstream(hidden_states, *others, **kwargs)
    step = STEPS.of(self, upstream)
    if step.reason:
        _left.note(self, step.why(self))
        return upstream(hidden_states, *others, **kwargs)
    x = hidden_states.contiguous()
    products = step.products(x)
    if products is None:
        return upstream(hidden_states, *others, **kwargs)
    q, *own = step.projections(products, x, kwargs.get("position_embeddings"))
    own = kwargs["cache"].self_attention_cache.update(*own, self.self_attn.layer_idx)
    return step.result(products, x, q, *own, *kept)


def _kept_frames(
    self: Upstream, hidden_states: Tensor, others: tuple, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None:
    """Returns the frames' keys and values (B, H, K, d) in the cache and the masks of both attentions where the native
    calls can serve, else None. Each of B recordings has R / B hypotheses."""
    rows = len(hidden_states)
    if hidden_states.shape[1:2] != (1,) or rows > MOST_ROWS or len(others) > len(_ARGUMENTS):
        return None
    given = dict(zip(_ARGUMENTS, others, strict=False)) | kwargs
    cache, frames, *masks = (given.pop(name, None) for name in ("cache", "encoder_hidden_states", *_MASKS))
    if upstream_class(self).__name__ in _ROTARY and given.pop("position_embeddings", None) is None:
        return None
    index, held = self.self_attn.layer_idx, getattr(cache, "cross_attention_cache", None)
    if frames is None or held is None or not cache.is_updated.get(index):
        return None
    if any(value is not None and value is not False for name, value in given.items() if name not in _UNREAD):
        return None
    tokens, of_frames = cache.self_attention_cache, held.layers[index]
    own: Any = tokens.layers[index] if index < len(tokens.layers) else None
    shared = isinstance(of_frames, SharedRows)
    if type(own).__name__ != "DynamicLayer" or not (shared or type(of_frames).__name__ == "DynamicLayer"):
        return None
    keys, values = (
        map(of_frames.held.get, ("keys", "values")) if shared else (of_frames.keys, of_frames.values)
    )
    beams = of_frames.beams if shared else 1
    if not all(map(_is_read, (own.keys, own.values, keys, values))) or keys.shape != values.shape:
        return None
    seen, name = (own.get_seq_length() + 1, keys.shape[2]), implementation(self.self_attn.config)
    fits = len(keys) * beams == rows and beams <= layer_products.FEW_ROWS
    if not fits or not all(map(partial(_is_mask, name, rows), masks, seen)):
        return None
    plain = name in STANDARD and type(tokens).__name__ == "DynamicCache"
    if (
        not plain
        or tokens.offloading
        or held.offloading
        or not may_call(self, hidden_states, self.self_attn.q_proj.weight)
    ):
        return None
    return keys, values, *masks


def _is_read(t: Any) -> bool:
    """Says whether the native calls read this tensor: it is in float32 on the CPU, and wants no gradients."""
    plain = (
        type(t) is Tensor and t.dtype is torch.float32 and t.is_cpu and t.numel() > 0 and t.stride(-1) == 1
    )
    return plain and not (torch.is_grad_enabled() and t.requires_grad)


def _is_mask(implementation: str | None, rows: int, mask: Any, keys: int) -> bool:
    """Says whether the native calls do with a mask what this implementation of attention does. All but sdpa add the
    numbers of bools, and give NaN to a query that sees no key."""
    if mask is None:
        return True
    if not isinstance(mask, Tensor) or mask.shape not in ((rows, 1, 1, keys), (1, 1, 1, keys)):
        return False
    if implementation == "sdpa" and mask.dtype is torch.bool:
        return True
    return _is_read(mask) and (implementation == "sdpa" or bool((mask > -torch.inf).any(-1).all()))


class _Step(PackedLayer[Upstream]):
    OPERATIONS, COPIES = "modules", False

    def _why_not_ever(self, layer: Upstream) -> str:
        names = names_of(layer)
        parts = {name: layer.get_submodule(name) for name in names}
        own, frames = parts[names.own], parts[names.frames]
        self._norms = [parts[name] for name in (names.own_norm, names.frames_norm, names.last_norm)]
        projections = *_linears(own), *_linears(frames)
        self._linears = [
            *projections[:4],
            projections[4],
            projections[7],
            parts[names.first],
            parts[names.second],
        ]
        self._of_frames = projections[5:7]
        if not all(map(_is_norm, self._norms)):
            return "a norm is not torch's LayerNorm over the channels with a weight"
        if not all(map(plumbing.is_plain_linear, (*projections, *self._linears[6:]))):
            return "a product is not a plain torch.nn.Linear"
        width = self._linears[0].in_features
        if any(part.weight.shape != (width, width) for part in self._linears[:6]):
            return "keys or values have other channels than the layer"
        name = fused_name(parts[names.activation])
        if name is None:
            return f"its activation is {type(parts[names.activation]).__name__}"
        kind = upstream_class(layer)
        gated = kind.__name__ in _ROTARY
        self._numbers = width // own.head_dim, self._linears[7].in_features, _activation.NUMBERS[name], gated
        self._rotate = sys.modules[kind.__module__].apply_rotary_pos_emb if gated else None
        self._scales = [float(own.scaling), float(frames.scaling)]
        return ""

    def _pack(self, layer: Upstream) -> None:
        self._eps = [float(norm.eps) for norm in self._norms]
        none = self._norms[0].weight.new_empty(0)
        pairs = (weight_and_bias(norm) for norm in self._norms)
        self._affine = [none if t is None else t for pair in pairs for t in pair]
        self._biases = [none if part.bias is None else part.bias for part in self._linears]
        self._found: dict[tuple[Any, ...], Products] = {}

    def _example(self, by_modules: Callable[..., Any]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Computes the first token of two hypotheses with three frames each both ways, in float32."""
        width, heads = self._linears[0].in_features, self._numbers[0]
        x, frames = _wave(2, 1, width), _wave(2, 3, self._of_frames[0].in_features)
        angles = _wave(1, 1, 2)
        positions: Any = {"position_embeddings": (angles.cos(), angles.sin())} if self._rotate else {}
        with _reduced_weights.suspended():
            kept = [part(frames).unflatten(-1, (heads, -1)).transpose(1, 2) for part in self._of_frames]
            expected = by_modules(x, encoder_hidden_states=frames, **positions)
            products: Any = self.products(x)
            q, *own = self.projections(products, x, *positions.values())
            return [self.result(products, x, q, *own, *kept, None, None)], [expected]

    def products(self, x: Tensor) -> Products | None:
        """Returns the products of x (R, 1, width), or None if one of many rows has not been measured or one is
        watched."""
        key = len(x) if len(x) > layer_products.FEW_ROWS else 0, *layer_products.key()
        found = self._found.get(key)
        if found is None:
            factors = ((x, part.weight) for part in self._linears)
            found = layer_products.of(self._state, factors, few_rows=True)
            if found is None:
                return None
            self._found = {key: found}
        return None if found.watched() else found

    def projections(self, products: Products, x: Tensor, positions: Any = None) -> list[Tensor]:
        """Returns the queries (R, 1, width), keys and values (R, H, 1, d) of x (R, 1, width). ``positions``: cosines
        and sines (R or 1, 1, d or less), if upstream rotates queries and keys."""
        weights, ways = products.weights, products.ways
        q, k, v = _native.decoder_layer_projections.default(
            x, self._affine[:2], self._eps[0], weights[:3], self._biases[:3], ways[:3]
        )
        shape = len(x), self._numbers[0], 1, -1
        k, v = k.view(shape), v.view(shape)
        if self._rotate:
            q, k = self._rotate(q.view(shape), k, *positions)
            q = q.reshape(x.shape)
        return [q, k, v]

    def result(self, products: Products, x: Tensor, q: Tensor, *others: Tensor | None) -> Tensor:
        """Returns the layer's output (R, 1, width). The keys and values of all tokens come first, then those of the
        frames and both masks."""
        weights, ways = products.weights, products.ways
        y: Tensor = _native.decoder_layer.default(
            x,
            q,
            *others,
            self._affine[2:],
            self._eps[1:],
            weights[3:],
            self._biases[3:],
            ways[3:],
            *self._numbers,
            self._scales,
        )
        return y


def _is_norm(module: torch.nn.Module) -> bool:
    return (
        is_plain(module, torch.nn.LayerNorm)
        and len(module.normalized_shape) == 1
        and module.weight is not None
    )


def _wave(*shape: int) -> Tensor:
    n = torch.Size(shape).numel()
    return torch.arange(1.0, n + 1, dtype=torch.float32, device="cpu").sin_().view(shape)


def _linears(attention: Upstream) -> list[Any]:
    last = "out_proj" if hasattr(attention, "out_proj") else "o_proj"
    return [getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", last)]


STEPS = PackedLayers(_Step)
