# SPDX-License-Identifier: Apache-2.0
"""rnnt_joiner in chunks of rows: the tensor of all logits never exists, unless it is kept for the backward.

A chunk's logits are a matrix product between two passes over it: before it act(am + lm) is gathered, after it L and
the two logits of each row are taken, or, in the backward pass, the gradient replaces the logits. Rows outside the
boundary, and in the backward pass rows whose gradients are both 0, are in no chunk. All in float32, float64 for
float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastasr.ops import _activation, _gemm
from fastasr.ops.rnnt_joiner import band, targets

CHUNK_BYTES = 6 << 20
CHUNK_ROWS = 1040  # 1024 rows would put the elements of a column into the same cache sets


@dataclass
class Joiner:
    """The operands, contiguous and in the dtypes the kernels take."""

    am: Tensor
    lm: Tensor
    weight: Tensor
    bias: Tensor | None
    symbols: Tensor
    starts: Tensor
    boundary: Tensor | None
    s_range: int
    blank: int
    activation: int
    hat: bool

    @classmethod
    def of(cls, am, lm, weight, bias, symbols, starts, boundary, *rest) -> "Joiner":
        dtype = torch.promote_types(am.dtype, lm.dtype)
        wide = torch.promote_types(torch.promote_types(dtype, weight.dtype), torch.float32)
        if wide is torch.float64:
            dtype = wide
        am, lm, weight = am.to(dtype).contiguous(), lm.to(dtype).contiguous(), weight.to(wide).contiguous()
        bias = None if bias is None else bias.to(wide).contiguous()
        boundary = None if boundary is None else boundary.contiguous()
        return cls(am, lm, weight, bias, symbols.contiguous(), starts.contiguous(), boundary, *rest)

    @property
    def shape(self) -> tuple[int, int, int]:
        return *self.starts.shape, self.s_range

    def chunks(self, rows: Tensor):
        """(first row, rows) of each chunk."""
        size = self.weight.element_size() * sum(self.weight.shape)
        step = max(16, min(CHUNK_ROWS, CHUNK_BYTES // size // 16 * 16))
        return ((i, rows[i : i + step]) for i in range(0, rows.numel(), step))


def forward(*arguments) -> tuple[Tensor, Tensor, Tensor, object]:
    *tensors_and_options, need_gradients, keep = arguments
    with torch.autocast("cpu", enabled=False):
        return _forward(Joiner.of(*tensors_and_options), need_gradients, keep)


def _forward(p: Joiner, need_gradients: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor, object]:
    px, py = (torch.full(p.shape, -torch.inf, dtype=p.weight.dtype) for _ in range(2))
    normaliser = torch.zeros(p.shape, dtype=torch.float64)
    rows = band(p.symbols, p.starts, p.boundary, p.s_range)[1].flatten().nonzero().squeeze(1)
    kept = [] if keep and need_gradients else None
    for _, chunk in p.chunks(rows):
        hidden = _hidden(p, chunk)
        logits = _gemm.forward(hidden, p.weight, p.bias)
        _scores(p, logits, chunk, px, py, normaliser)
        if kept is not None:
            kept.append((chunk, hidden, logits))
    return px, py, normaliser, kept


def backward(grad_symbol, grad_blank, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *tensors, normaliser, s_range, blank, activation, hat, _, kept = arguments
    p = Joiner.of(*tensors, s_range, blank, activation, hat)
    wide = p.weight.dtype
    gx, gy = grad_symbol.to(wide).contiguous(), grad_blank.to(wide).contiguous()
    dam, dlm = torch.zeros(p.am.shape, dtype=wide), torch.zeros(p.lm.shape, dtype=wide)
    dweight = torch.zeros_like(p.weight)
    dbias = torch.zeros(p.weight.shape[0], dtype=torch.float64)
    _, inside, has_symbol = band(p.symbols, p.starts, p.boundary, p.s_range)
    wanted = (inside & ((gy != 0) | ((gx != 0) & has_symbol))).flatten()
    for chunk, hidden, logits in _kept(wanted, kept) if kept is not None else _again(p, wanted):
        d = _logits_grad(p, logits, chunk, gx, gy, normaliser)
        dbias += d.sum(0, dtype=torch.float64)
        dweight.addmm_(d.t(), hidden)
        _hidden_grad(p, _gemm.input_grad(d, p.weight), hidden, chunk, dam, dlm)
    am, lm, weight, bias = tensors[:4]
    found = dam.to(am.dtype), dlm.to(lm.dtype), dweight.to(weight.dtype)
    return *found, weight.new_empty(0) if bias is None else dbias.to(bias.dtype)


def _again(p: Joiner, wanted: Tensor):
    for _, chunk in p.chunks(wanted.nonzero().squeeze(1)):
        hidden = _hidden(p, chunk)
        yield chunk, hidden, _gemm.forward(hidden, p.weight, p.bias)


def _kept(wanted: Tensor, kept: list):
    for chunk, hidden, logits in kept:
        left = wanted[chunk]
        if not left.all():
            left = left.nonzero().squeeze(1)
            chunk, hidden, logits = chunk[left], hidden[left], logits[left]
        if chunk.numel():
            yield chunk, hidden, logits


# --------------------------------------------------------------------------- passes over a chunk
def _parts(p: Joiner, chunk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    frame = chunk // p.s_range
    s = p.starts.flatten()[frame] + chunk % p.s_range
    return frame, frame // p.starts.shape[1], s


def _hidden(p: Joiner, chunk: Tensor) -> Tensor:
    frame, batch, s = _parts(p, chunk)
    wide = p.weight.dtype
    return _activation.function(_activation.NAMES[p.activation])(
        p.am.flatten(0, 1)[frame].to(wide) + p.lm.flatten(0, 1)[batch * p.lm.shape[1] + s].to(wide)
    )


def _scores(p: Joiner, logits, chunk, px, py, normaliser) -> None:
    _, has_symbol = band(p.symbols, p.starts, p.boundary, p.s_range)[1:]
    _, batch, s = _parts(p, chunk)
    target = targets(
        p.symbols, s.clamp(max=p.symbols.shape[1])[None].expand(len(p.symbols), -1), logits.shape[1]
    )
    y = target[batch, torch.arange(len(chunk))]
    at = logits.gather(1, y[:, None]).squeeze(1)
    z = logits[:, p.blank]
    if p.hat:
        others = logits.index_fill(1, torch.tensor([p.blank]), -torch.inf)
        total = others.double().logsumexp(1)
        at = at.masked_fill(y == p.blank, -torch.inf)
        values, blanks = at - total + torch.nn.functional.logsigmoid(-z), torch.nn.functional.logsigmoid(z)
    else:
        total = logits.double().logsumexp(1)
        values, blanks = at - total, z - total
    values = values.to(px.dtype).masked_fill(~has_symbol.flatten()[chunk], -torch.inf)
    px.view(-1)[chunk], py.view(-1)[chunk] = values, blanks.to(px.dtype)
    normaliser.view(-1)[chunk] = total


def _logits_grad(p: Joiner, logits, chunk, gx, gy, normaliser) -> Tensor:
    has_symbol = band(p.symbols, p.starts, p.boundary, p.s_range)[2].flatten()[chunk]
    _, batch, s = _parts(p, chunk)
    target = targets(p.symbols, s[None].expand(len(p.symbols), -1), logits.shape[1])
    y = target[batch, torch.arange(len(chunk))][:, None]
    x = torch.where(has_symbol, gx.flatten()[chunk], 0.0)[:, None]
    b = gy.flatten()[chunk][:, None]
    z = logits[:, p.blank, None].clone()
    soft = -(x if p.hat else x + b) * (logits.double() - normaliser.flatten()[chunk][:, None]).exp().to(
        logits.dtype
    )
    d = soft.scatter_add_(1, y, torch.where(y == p.blank, x + b, x))
    blank = d[:, p.blank, None] + torch.where(y == p.blank, 0.0, b)
    if p.hat:
        blank = b * torch.sigmoid(-z) - x * torch.sigmoid(z)
    d[:, p.blank] = blank.squeeze(1)
    return d


def _hidden_grad(p: Joiner, dh, hidden, chunk, dam, dlm) -> None:
    frame, batch, s = _parts(p, chunk)
    slope = 1 - hidden.square() if _activation.NAMES[p.activation] == "tanh" else (hidden > 0).to(dh.dtype)
    da = dh * slope
    dam.flatten(0, 1).index_add_(0, frame, da)
    dlm.flatten(0, 1).index_add_(0, batch * dlm.shape[1] + s, da)
