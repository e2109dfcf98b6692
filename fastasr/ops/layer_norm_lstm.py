# SPDX-License-Identifier: Apache-2.0
r"""LSTM with LayerNorm on the gates and on the cell (torchaudio's RNN-T predictor), whole sequences or one step.

    i, f, v, o = the quarters of LN(x_t W_xᵀ + h W_hᵀ)
    c = LN(σ(f) c + σ(i) tanh(v))        h = σ(o) tanh(c)        y_t = h

with LN(z) = (z − mean z) / √(var z + eps) ⊙ weight + bias over the 4H gates and over the H cells: torchaudio's
``_CustomLSTM`` with ``layer_norm=True``, from ``torchaudio.models.rnnt``.

Backward, with n the normalised row, s = 1 / √(var + eps), and d the gradient before weight: d LN = (d − mean d − n mean
d n) s; through the activations as they stand; dh of the step before is dgates W_h. The gradients of x, W_x and W_h are
one matrix product each over all steps. Kept for it: n of gates and cell and the two s, 5H + 2 numbers per step and
sequence; activations and cells are computed again.

FLOPs: 8 H (D + H) per step and sequence forward. The product with W_x runs over all steps at once; W_h, 4H × H numbers,
is read in every step, from a cache that holds it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from fastasr.ops import _check, _gemm
from fastasr.ops._dispatch import PLAIN, KernelFamily, direct, native_kernels, served, triton_kernels
from fastasr.ops._register import autocast_dtype, cast, refuse_double_backward, register

NAME = "layer_norm_lstm"
FAMILY = KernelFamily(NAME, (NAME,), (native_kernels(NAME), triton_kernels(NAME)))

# Rows (steps x sequences) up to which the C++ kernels multiply by input_weight themselves, step by step: over several
# steps they read it again in each.
FEW_ROWS, FEW_ROWS_OF_ONE_STEP = 4, 32


def _few(x: Tensor) -> bool:
    return 0 < x.numel() <= (FEW_ROWS_OF_ONE_STEP if x.shape[0] == 1 else FEW_ROWS) * x.shape[2]


# --------------------------------------------------------------------------- definition
def definition(
    x: Tensor,
    input_weight: Tensor,
    hidden_weight: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    cell_weight: Tensor,
    cell_bias: Tensor,
    hidden: Tensor | None = None,
    cell: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in eager PyTorch, step by step."""
    units = hidden_weight.shape[1]
    h = x.new_zeros(x.shape[1], units) if hidden is None else hidden
    c = x.new_zeros(x.shape[1], units) if cell is None else cell
    steps = []
    for gates in F.linear(x, input_weight).unbind(0):
        gates = F.layer_norm(gates + F.linear(h, hidden_weight), (4 * units,), gate_weight, gate_bias, eps)
        i, f, v, o = gates.chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(v)
        c = F.layer_norm(c, (units,), cell_weight, cell_bias, eps)
        h = torch.sigmoid(o) * torch.tanh(c)
        steps.append(h)
    y = torch.stack(steps) if steps else x.new_empty(0, x.shape[1], units)
    return y, h, c


def _output_dtype(x: Tensor, *norms: Tensor) -> torch.dtype:
    dtype = x.dtype
    for t in norms:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


# --------------------------------------------------------------------------- kernels
def forward(
    x: Tensor,
    input_weight: Tensor,
    hidden_weight: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    cell_weight: Tensor,
    cell_bias: Tensor,
    hidden: Tensor | None,
    cell: Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, last hidden, last cell, kept) without autograd; ``kept`` has no elements unless ``keep``."""
    norms = gate_weight, gate_bias, cell_weight, cell_bias
    dtype = _output_dtype(x, *norms)
    kernels = FAMILY.kernels(x, *norms)
    if kernels is None:
        with torch.no_grad():
            y, h, c = definition(x, input_weight, hidden_weight, *norms, hidden, cell, eps)
            # a state that went through no step is no output of its own
            return y.to(dtype), *(t.to(dtype, copy=x.shape[0] == 0) for t in (h, c)), y.new_empty(0)
    few = kernels.backend == "cpu" and _few(x)
    work = torch.promote_types(dtype, torch.float32)
    if kernels.backend != "cpu":
        # a product of another layout rounds otherwise, which the norms of few units enlarge
        x, input_weight = x.contiguous(), input_weight.contiguous()
    product = x if few else _gemm.forward(x, input_weight, None)
    weight = hidden_weight
    if kernels.backend == "cpu":
        product, weight = product.to(work), weight.to(work)
    outputs = kernels.forward(
        product.contiguous(),
        input_weight.to(work).contiguous() if few else None,
        weight.contiguous(),
        *(t.to(work).contiguous() for t in norms),
        *(None if t is None else t.to(work).contiguous() for t in (hidden, cell)),
        eps,
        keep,
    )
    return *(t.to(dtype) for t in outputs[:3]), outputs[3]


def backward(
    grad_y: Tensor | None,
    grad_hidden: Tensor | None,
    grad_cell: Tensor | None,
    x: Tensor,
    input_weight: Tensor,
    hidden_weight: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    cell_weight: Tensor,
    cell_bias: Tensor,
    hidden: Tensor | None,
    cell: Tensor | None,
    y: Tensor,
    kept: Tensor,
    eps: float,
    needs: list[bool] | tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of the nine tensors, None where ``needs`` does not ask; any of the three given may be None."""
    norms = gate_weight, gate_bias, cell_weight, cell_bias
    kernels = FAMILY.kernels(x, *norms)
    tensors = x, input_weight, hidden_weight, *norms, hidden, cell
    if kernels is None:
        return _definition_backward((grad_y, grad_hidden, grad_cell), tensors, eps, needs)
    work = torch.promote_types(y.dtype, torch.float32)
    weight = hidden_weight.to(work) if kernels.backend == "cpu" else hidden_weight
    need_state = needs[7] and hidden is not None
    dgates, *dnorms, dhidden, dcell = kernels.backward(
        *(None if g is None else g.to(work).contiguous() for g in (grad_y, grad_hidden, grad_cell)),
        weight.contiguous(),
        *(t.to(work).contiguous() for t in norms),
        None if cell is None else cell.to(work).contiguous(),
        kept,
        x.shape[0],
        x.shape[1],
        eps,
        need_state,
    )
    dgates = dgates.to(x.dtype)
    grads = [None] * 9
    if needs[0]:
        grads[0] = _gemm.input_grad(dgates, input_weight)
    if needs[1]:
        grads[1] = _gemm.weight_grad(dgates, x)
    if needs[2]:
        before, along = y[:-1], dgates[1:]  # a state of zeros adds nothing
        if hidden is not None and len(y):
            before, along = torch.cat((hidden.to(y.dtype)[None], before)), dgates
        grads[2] = _gemm.weight_grad(along, before.to(x.dtype))
    grads[3:7] = (d.to(t.dtype) for d, t in zip(dnorms, norms, strict=True))
    grads[7] = dhidden.to(hidden.dtype) if need_state else None
    grads[8] = dcell.to(cell.dtype) if needs[8] and cell is not None else None
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def _definition_backward(given, tensors, eps: float, needs) -> tuple[Tensor | None, ...]:
    with torch.enable_grad():
        leaves = [
            None if t is None else t.detach().requires_grad_(need)
            for t, need in zip(tensors, needs, strict=True)
        ]
        outputs = definition(*leaves, eps)
    pairs = [
        (o, g.to(o.dtype)) for o, g in zip(outputs, given, strict=True) if g is not None and o.requires_grad
    ]
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    found = map(torch.zeros_like, wanted)
    if pairs and wanted:
        outputs, given = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, given, materialize_grads=True))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in leaves)


class _LayerNormLstm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *tensors, eps = arguments
        y, h, c, kept = forward(*tensors, eps, True)
        ctx.save_for_backward(*tensors, y, kept)
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        return y, h, c

    @staticmethod
    def backward(ctx, *grads):
        refuse_double_backward(NAME)
        if all(g is None for g in grads):
            return (None,) * 10
        return *backward(*grads, *ctx.saved_tensors, ctx.eps, ctx.needs_input_grad[:9]), None


# --------------------------------------------------------------------------- registration
def _fake_forward(
    x, input_weight, hidden_weight, gate_weight, gate_bias, cell_weight, cell_bias, hidden, cell, eps, keep
):
    norms = gate_weight, gate_bias, cell_weight, cell_bias
    dtype = _output_dtype(x, *norms)
    steps, batch, units = x.shape[0], x.shape[1], hidden_weight.shape[1]

    def empty(*shape: int, dtype=dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    kept = steps * batch * (5 * units + 2) if keep and FAMILY.kernels(x, *norms) is not None else 0
    work = torch.promote_types(dtype, torch.float32)
    return empty(steps, batch, units), empty(batch, units), empty(batch, units), empty(kept, dtype=work)


def _registered_backward(
    grad_y,
    grad_hidden,
    grad_cell,
    x,
    input_weight,
    hidden_weight,
    gate_weight,
    gate_bias,
    cell_weight,
    cell_bias,
    hidden,
    cell,
    y,
    kept,
    eps,
    needs,
):
    tensors = x, input_weight, hidden_weight, gate_weight, gate_bias, cell_weight, cell_bias, hidden, cell
    found = backward(grad_y, grad_hidden, grad_cell, *tensors, y, kept, eps, needs)
    return tuple(x.new_empty(0) if g is None else g for g in found)


def _fake_backward(
    grad_y,
    grad_hidden,
    grad_cell,
    x,
    input_weight,
    hidden_weight,
    gate_weight,
    gate_bias,
    cell_weight,
    cell_bias,
    hidden,
    cell,
    y,
    kept,
    eps,
    needs,
):
    tensors = x, input_weight, hidden_weight, gate_weight, gate_bias, cell_weight, cell_bias, hidden, cell
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if need and t is not None else x.new_empty(0)
        for t, need in zip(tensors, needs, strict=True)
    )


_TENSORS = (
    "Tensor x, Tensor input_weight, Tensor hidden_weight, Tensor gate_weight, Tensor gate_bias, Tensor cell_weight, "
    "Tensor cell_bias, Tensor? hidden, Tensor? cell"
)
_BACKWARD_OP = register(
    f"{NAME}_backward(Tensor? grad_y, Tensor? grad_hidden, Tensor? grad_cell, {_TENSORS}, Tensor y, Tensor kept, "
    f"float eps, bool[] needs) -> ({', '.join(['Tensor'] * 9)})",
    _registered_backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, eps, keep = inputs
    y, _, _, kept = output
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, y, kept)
    ctx.eps, ctx.keep = eps, keep


def _op_backward(ctx, grad_y, grad_hidden, grad_cell, _):
    needs = list(ctx.needs_input_grad[:9])
    if grad_y is None and grad_hidden is None and grad_cell is None:
        return (None,) * 11
    *tensors, y, kept = ctx.saved_tensors
    if not ctx.keep:
        kept = _OP(*tensors, ctx.eps, True)[3]
    grads = _BACKWARD_OP(grad_y, grad_hidden, grad_cell, *tensors, y, kept, ctx.eps, needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None


_OP = register(
    f"{NAME}({_TENSORS}, float eps, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    forward,
    _fake_forward,
    setup_context=_setup_context,
    backward=_op_backward,
    autocast=lambda dtype, *arguments: (*cast(dtype, *arguments[:3]), *arguments[3:]),
)


# --------------------------------------------------------------------------- public function
def layer_norm_lstm(
    x: Tensor,
    input_weight: Tensor,
    hidden_weight: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    cell_weight: Tensor,
    cell_bias: Tensor,
    hidden: Tensor | None = None,
    cell: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """An LSTM layer with LayerNorm on gates and cell, over a whole sequence or one step.

    Args:
        x: (T, B, D); float32, bfloat16, float16 or float64.
        input_weight: (4H, D), hidden_weight: (4H, H), in the order input, forget, cell and output gate; x's dtype,
            except under autocast, which casts the three.
        gate_weight, gate_bias: (4H,), of the gates' LayerNorm; cell_weight, cell_bias: (H,), of the cell's.
        hidden, cell: (B, H), the state before the first step; None: zeros.
        eps: added to both variances.
    Returns:
        y (T, B, H), and the state after the last step, hidden and cell, (B, H) each: in the promoted dtype of x and the
        normalisations' parameters, computed in float32 or better. hidden is y[-1].
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not match.
    """
    arguments = x, input_weight, hidden_weight, gate_weight, gate_bias, cell_weight, cell_bias, hidden, cell
    if (
        not is_compiling()
        and FAMILY.native is not None
        and type(eps) is float
        and eps >= 0
        and all(t is None or (type(t) in PLAIN and t.is_cpu and t.dtype is torch.float32) for t in arguments)
        and not torch.is_autocast_enabled("cpu")
    ):
        try:
            if is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments):
                return _LayerNormLstm.apply(*arguments, eps)
            operands = (x, input_weight) if _few(x) else (_gemm.forward(x, input_weight, None), None)
            return FAMILY.native.forward(*operands, *arguments[2:], eps, False)[:3]
        except (RuntimeError, IndexError, AttributeError, ValueError):
            pass  # the checked path tells why, or does what the kernels do not
    _check_arguments(*arguments)
    eps = _check.number(NAME, "eps", eps)
    dtype = autocast_dtype(x)
    if dtype is None:
        for name, t in (("input_weight", input_weight), ("hidden_weight", hidden_weight)):
            if t.dtype != x.dtype:
                raise TypeError(
                    f"fastasr.{NAME}: {name}: expected dtype {x.dtype} (that of x), got {t.dtype}"
                )
    plain, wide = direct(*arguments), (x, *arguments[3:7])
    if (FAMILY.kernels(*wide) is None) if plain else not served(NAME, *wide):
        return definition(*arguments, eps)
    differentiated = is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments)
    if not plain:
        return _OP(*arguments, eps, differentiated)[:3]
    if dtype is not None:
        arguments = *cast(dtype, *arguments[:3]), *arguments[3:]
    if differentiated:
        return _LayerNormLstm.apply(*arguments, eps)
    return forward(*arguments, eps, False)[:3]


def _check_arguments(
    x, input_weight, hidden_weight, gate_weight, gate_bias, cell_weight, cell_bias, hidden, cell
) -> None:
    _check.floating_tensor(NAME, "x", x)
    _check.floating_tensor(NAME, "hidden_weight", hidden_weight)
    _check.shape(NAME, "x", x, "(T, B, D)", x.dim() == 3)
    ok = hidden_weight.dim() == 2 and hidden_weight.shape[0] == 4 * hidden_weight.shape[1]
    _check.shape(NAME, "hidden_weight", hidden_weight, "(4H, H)", ok and hidden_weight.shape[1] > 0)
    units, batch = hidden_weight.shape[1], x.shape[1]
    for name, t, shape in (
        ("input_weight", input_weight, (4 * units, x.shape[2])),
        ("hidden_weight", hidden_weight, (4 * units, units)),
        ("gate_weight", gate_weight, (4 * units,)),
        ("gate_bias", gate_bias, (4 * units,)),
        ("cell_weight", cell_weight, (units,)),
        ("cell_bias", cell_bias, (units,)),
        ("hidden", hidden, (batch, units)),
        ("cell", cell, (batch, units)),
    ):
        if t is None and name in ("hidden", "cell"):
            continue
        _check.floating_tensor(NAME, name, t)
        _check.shape(NAME, name, t, f"{shape}", t.shape == shape)
        _check.same_device(NAME, name, t, x, "x")
