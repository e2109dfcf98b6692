# SPDX-License-Identifier: Apache-2.0
"""A token of each hypothesis through a layer of a Transformer's decoder, or of a language model, in inference on a CPU,
in two native calls.

csrc/bindings/decoder_layer.cpp computes the layer's norms, products and both attentions on the layer's own weights, or
on their copies in fewer bits. Between the calls the caller adds the token's keys and values to those of earlier tokens.
Python and torch's dispatcher take as long as a small model's products.
"""

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastasr import _left, ops
from fastasr.models.common import layer_products, plumbing
from fastasr.models.common.activations import fused_name
from fastasr.models.common.layer_products import Products
from fastasr.models.common.packed_layers import PackedLayer, PackedLayers
from fastasr.models.common.plain import is_upstreams, weight_and_bias
from fastasr.ops import _activation, _reduced_weights
from fastasr.swap.forwards.torch_attention import why_not
from fastasr.swap.rule import Upstream

_native = torch.ops.fastasr_cpu
MOST_ROWS = 256  # With more rows, the time between products is a small part.
# Computes the layer's output (R, 1, width) for the second of two tokens by its modules, from both tokens (R, 2, width),
# the encoder's frames (R, K, width), if there are any, and the positions of both, if the layer rotates queries and keys
ByModules = Callable[..., Tensor]
# Rotates queries and keys (R, H, 1, d) by positions
Rotate = Callable[..., tuple[Tensor, Tensor]]


class Names(NamedTuple):
    """The names of a layer's parts."""

    own: str  # attention to earlier tokens
    own_norm: str
    frames: str  # attention to the encoder's frames; "" and "" in a language model
    frames_norm: str
    first: str  # the products of the feed-forward block
    activation: str
    second: str
    last_norm: str
    projections: tuple[
        str, ...
    ]  # queries, keys, values and output of both attentions; () for torch's attention
    head_dim: str  # their number of channels per head
    norm_first: str = ""  # whether norms come before the blocks; always, if ""

    def children(self) -> set[str]:
        return {name.partition(".")[0] for name in self[:8] if name}


class _Projection(NamedTuple):
    """A product of torch's MultiheadAttention."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class Step(PackedLayer[Upstream]):
    OPERATIONS, COPIES = "modules", False

    def __init__(
        self,
        layer: Upstream,
        by_modules: ByModules,
        names: Names,
        rotate: Rotate | None = None,
        gated: bool = False,
    ) -> None:
        self._names, self._rotate, self._gated = names, rotate, gated
        super().__init__(layer, by_modules)

    def _why_not_ever(self, layer: Upstream) -> str:
        try:
            return self._why_parts_do_not_fit(layer)
        except AttributeError as missing:
            return f"a part has no counterpart here: {missing}"

    def _why_parts_do_not_fit(self, layer: Upstream) -> str:
        names = self._names
        attentions = [attrgetter(name)(layer) for name in (names.own, names.frames) if name]
        norms = [
            attrgetter(name)(layer) for name in (names.own_norm, names.frames_norm, names.last_norm) if name
        ]
        first, second = attrgetter(names.first, names.second)(layer)
        if not names.projections and (reason := next(filter(None, map(why_not, attentions)), "")):
            return reason
        of_own, *others = map(self._projections, attentions)
        self._of_frames = [part for _, *of_frames, _ in others for part in of_frames]
        around = [part for q, _, _, output in others for part in (q, output)]
        self._linears = [*of_own, *around, first, second]
        plain = (part for part in (*self._linears, *self._of_frames) if not isinstance(part, _Projection))
        if not all(map(_is_norm, norms)):
            return "a norm is not torch's LayerNorm over the channels with a weight"
        if not all(map(plumbing.is_plain_linear, plain)):
            return "a product is not a plain torch.nn.Linear"
        width = first.weight.shape[1]
        if any(part.weight.shape != (width, width) for part in self._linears[:-2]):
            return "keys or values have other channels than the layer"
        activation = attrgetter(names.activation)(layer)
        name = _activation_name(activation)
        if name is None:
            return f"its activation is {type(activation).__name__}"
        dims = [getattr(attention, names.head_dim) for attention in attentions]
        self.heads = width // dims[0]
        self._numbers = self.heads, second.weight.shape[1], _activation.NUMBERS[name], self._gated
        self._attentions = [(part, dim**-0.5) for part, dim in zip(attentions, dims, strict=True)]
        # The native calls are before and behind the cache.
        before = 1 if not names.norm_first or getattr(layer, names.norm_first) else 0
        self._norms = norms[:before], norms[before:]
        return ""

    def _projections(self, attention: Upstream) -> list[Any]:
        """Returns the products of queries, keys, values and the output."""
        if self._names.projections:
            return [getattr(attention, name) for name in self._names.projections]
        weight, bias = attention.in_proj_weight.detach(), attention.in_proj_bias
        biases = (None,) * 3 if bias is None else bias.detach().chunk(3)
        parts = zip(weight.chunk(3), biases, strict=True)
        return [*(_Projection(*part) for part in parts), _Projection(*weight_and_bias(attention.out_proj))]

    def _pack(self, layer: Upstream) -> None:
        none = self._linears[0].weight.new_empty(0)
        self._eps = [[float(norm.eps) for norm in norms] for norms in self._norms]
        self._affine = [
            [none if t is None else t for norm in norms for t in weight_and_bias(norm)]
            for norms in self._norms
        ]
        self._biases = [none if part.bias is None else part.bias for part in self._linears]
        self._found: dict[tuple[Any, ...], Products] = {}

    def _example(self, by_modules: ByModules) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Computes the second token of two hypotheses with three frames each both ways, in float32."""
        x = _wave(2, 2, self._linears[0].weight.shape[1])
        frames = [_wave(2, 3, part.weight.shape[1]) for part in self._of_frames[:1]]
        angles = _wave(1, 2, 2)
        positions = [(angles.cos(), angles.sin())] if self._rotate else []
        with _reduced_weights.suspended(), _left.ignored():
            expected = by_modules(x, *frames, *positions)
            first, second = (x[:, i : i + 1].contiguous() for i in range(2))
            products: Any = self.products(second)
            places = [[[t[:, i : i + 1] for t in pair] for pair in positions] for i in range(2)]
            _, *before = self.projections(products, first, *places[0])
            q, *own = self.projections(products, second, *places[1])
            own = [torch.cat(pair, 2) for pair in zip(before, own, strict=True)]
            of_frames = self.of_frames(*frames) if frames else (None, None)
            native = self.result(products, second, q, *own, *of_frames, None, None)
            return native, [expected]

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
        """Returns the queries (R, 1, width), keys and values (R, H, 1, d) of x (R, 1, width). ``positions``: what
        ``rotate`` needs, if there is one."""
        weights, ways = products.weights, products.ways
        q, k, v = _native.decoder_layer_projections.default(
            x, self._affine[0], self._eps[0], weights[:3], self._biases[:3], ways[:3]
        )
        shape = len(x), self.heads, 1, -1
        k, v = k.view(shape), v.view(shape)
        if self._rotate:
            q, k = self._rotate(q.view(shape), k, *positions)
            q = q.reshape(x.shape)
        return [q, k, v]

    def of_tokens(self, x: Tensor) -> list[Tensor]:
        """Returns the keys and values (R, T, width) of tokens x (R, T, width), which it does not rotate."""
        for norm in self._norms[0]:
            x = norm(x)
        return [part(x) for part in self._linears[1:3]]

    def of_frames(self, frames: Tensor) -> list[Tensor]:
        """Returns the keys and values (B, H, K, d) of an encoder's frames (B, K, width)."""
        return [self.in_heads(part(frames)) for part in self._of_frames]

    def in_heads(self, t: Tensor) -> Tensor:
        """Returns t (R, T, width) as (R, H, T, d)."""
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def result(
        self, products: Products, x: Tensor, q: Tensor, *others: Tensor | None, attended: bool = False
    ) -> list[Tensor]:
        """Returns the layer's output (R, 1, width), and with ``attended`` the weights of both attentions (R, H, 1, T)
        and (R, H, 1, K). The keys and values of all tokens come first, then those of the frames, None in a language
        model, and both masks."""
        weights, ways = products.weights, products.ways
        found: list[Tensor] = _native.decoder_layer.default(
            x,
            q,
            *others,
            self._affine[1],
            self._eps[1],
            weights[3:],
            self._biases[3:],
            ways[3:],
            *self._numbers,
            [float(getattr(part, "scaling", scale)) for part, scale in self._attentions],
            attended,
        )
        return found


def _activation_name(activation: Any) -> str | None:
    """Returns the kernels' name for a module or, in NeMo, a function."""
    if isinstance(activation, torch.nn.Module):
        return fused_name(activation)
    return next((name for name, known in _activation.FUNCTIONS.items() if known is activation), None)


def _is_norm(module: Any) -> bool:
    """Says whether this is torch's LayerNorm over the last dimension. ESPnet's class is one of torch's."""
    plain = isinstance(module, torch.nn.LayerNorm) and getattr(module, "dim", -1) == -1
    return plain and len(module.normalized_shape) == 1 and module.weight is not None


def _wave(*shape: int) -> Tensor:
    n = torch.Size(shape).numel()
    return torch.arange(1.0, n + 1, dtype=torch.float32, device="cpu").sin_().view(shape)


def later(x: Tensor) -> Tensor:
    """Returns the mask (2, 2) that hides the second of two tokens from the first, to add to scores of x's dtype."""
    return torch.full((2, 2), -torch.inf, dtype=x.dtype, device="cpu").triu_(1)


STEPS = PackedLayers(Step)


def products_of(steps: list[Step], x: Tensor) -> list[Products] | None:
    """Returns the products of all steps of x (R, 1, width), or None where one has none."""
    found = [products for step in steps if (products := step.products(x)) is not None]
    return found if len(found) == len(steps) else None


def steps_of(
    owner: Upstream, layers: Any, by_modules: Callable[..., Tensor], names: Names
) -> list[Step] | None:
    """Returns those of all layers of ``owner``, or None where a layer must run upstream's code, and notes why.
    ``by_modules`` gets the layer first."""
    steps = []
    for layer in layers:
        if layer.training or not is_upstreams(layer, owner):
            return None
        steps.append(STEPS.of(layer, partial(by_modules, layer), names))
        if steps[-1].reason:
            _left.note(owner, steps[-1].why(layer))
            return None
    return steps
