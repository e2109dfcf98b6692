# SPDX-License-Identifier: Apache-2.0
# `make op OP=toeplitz_attention` writes this file from fastasr/ops/toeplitz_attention.py: change that one.
"""Mega's gated attention: softmax(q kᵀ / √d + bias) value · act(gate), q and k affine in act(query_key)"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from fastasr._transforms import by_formula, transforms_active
from fastasr.kernels import Unlaunchable
from fastasr.ops._dispatch import FLOATING, PLAIN, served
from fastasr.ops._op import OPS, Written
from fastasr.ops._operator import register_op
from fastasr.ops._register import refuse_double_backward
from fastasr.ops._runtime import (
    BOOL,
    COMPUTE,
    MASKS,
    NOT_MINE,
    applied,
    back,
    laid_out,
    listed,
    make,
    node_gradients,
    not_a_view,
    promoted,
)
from fastasr.ops.toeplitz_attention import _chunks, _gradients, _launch
from fastasr.ops.toeplitz_attention import toeplitz_attention as formula

op = OPS["toeplitz_attention"]
family = op.family
ACTIVATION_CODES = {"identity": 0, "silu": 1, "relu": 2, "tanh": 3, "gelu": 4}


class Arguments(NamedTuple):
    query_key: Tensor
    gate: Tensor
    value: Tensor
    qk_weight: Tensor
    qk_bias: Tensor
    position_bias: Tensor
    causal: bool = True
    padding_mask: Tensor | None = None
    chunk_size: int = 0
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"] = "silu"
    weights_dropout: Tensor | None = None
    activate_value: bool = False


class Saved(NamedTuple):
    query_key: Tensor
    gate: Tensor
    value: Tensor
    qk_weight: Tensor
    qk_bias: Tensor
    position_bias: Tensor
    padding_mask: Tensor | None
    weights_dropout: Tensor | None
    mixed: Tensor
    causal: bool
    chunk_size: int
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"]
    activate_value: bool


# --------------------------------------------------------------------------- the public function
def toeplitz_attention(
    query_key: Tensor,
    gate: Tensor,
    value: Tensor,
    qk_weight: Tensor,
    qk_bias: Tensor,
    position_bias: Tensor,
    *,
    causal: bool = True,
    padding_mask: Tensor | None = None,
    chunk_size: int = 0,
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"] = "silu",
    weights_dropout: Tensor | None = None,
    activate_value: bool = False,
) -> Tensor:
    """Mega's gated attention: softmax(q kᵀ / √d + bias) value · act(gate), q and k affine in act(query_key).

    Queries and keys have one length: decoding against a longer history of keys is another operation.

    Args:
        query_key: (L, B, d), before the activation; any strides, so a slice of a projection needs no copy.
        gate: (L, B, V), before the activation.
        value: (L, B, V), after it, or before it with ``activate_value``.
        qk_weight, qk_bias: (2, d): row 0 makes queries, row 1 keys.
        position_bias: (2 P − 1,), P at least the frames of a chunk (of the sequence without chunks): entry
            P − 1 + j − i is added to the score of query i and key j.
        causal: query i sees keys j ≤ i alone.
        padding_mask: bool (B, L), True where a key is padding. A chunk of padding alone ignores it. A query that is
            left without any key gives NaN, as a softmax of nothing does.
        chunk_size: frames per chunk, each attending to itself; 0 or less: one chunk. The last one may be shorter.
        activation: "identity", "silu", "relu", "tanh" or "gelu".
        weights_dropout: (B, chunks, C, C), C the frames of a chunk: multiplied on the weights after the softmax.
    Returns:
        (L, B, V) in the promoted dtype of value and gate.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or names do not match.
    """
    kernels = family.native
    if (
        kernels is not None
        and type(query_key) in PLAIN
        and query_key.is_cpu
        and (dtype := query_key.dtype)
        and (query_key.is_contiguous() or query_key.stride(-1) == 1)
        and type(gate) in PLAIN
        and type(value) in PLAIN
        and type(qk_weight) in PLAIN
        and qk_weight.dtype in COMPUTE
        and type(qk_bias) in PLAIN
        and type(position_bias) in PLAIN
        and (padding_mask is None or type(padding_mask) in PLAIN)
        and (
            weights_dropout is None
            or (
                type(weights_dropout) in PLAIN
                and weights_dropout.dtype is dtype
                and not weights_dropout.requires_grad
            )
        )
        and type(causal) is bool
        and type(chunk_size) is int
        and type(activation) is str
        and activation in ACTIVATION_CODES
        and type(activate_value) is bool
        and not is_dynamo_compiling()
        and not (transforms_active() or forward_ad._current_level >= 0)
    ):
        try:
            if is_grad_enabled() and (
                query_key.requires_grad
                or gate.requires_grad
                or value.requires_grad
                or qk_weight.requires_grad
                or qk_bias.requires_grad
                or position_bias.requires_grad
            ):
                return apply(
                    kernels, True, query_key, gate, value, qk_weight, qk_bias, position_bias, causal,
                    padding_mask, chunk_size, activation, weights_dropout, activate_value,
                )  # fmt: skip
            y, _ = kernels.forward(
                query_key, gate, value, qk_weight, qk_bias, position_bias, padding_mask, weights_dropout,
                causal, chunk_size, ACTIVATION_CODES[activation], activate_value, False,
            )  # fmt: skip
            return y
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(
                query_key, gate, value, qk_weight, qk_bias, position_bias, causal, padding_mask, chunk_size,
                activation, weights_dropout, activate_value,
            )  # fmt: skip
            raise
    check(
        query_key, gate, value, qk_weight, qk_bias, position_bias, causal, padding_mask, chunk_size,
        activation, weights_dropout, activate_value,
    )  # fmt: skip
    if is_compiling() or not (
        type(query_key) in PLAIN
        and type(gate) in PLAIN
        and type(value) in PLAIN
        and type(qk_weight) in PLAIN
        and type(qk_bias) in PLAIN
        and type(position_bias) in PLAIN
        and (padding_mask is None or type(padding_mask) in PLAIN)
        and (weights_dropout is None or type(weights_dropout) in PLAIN)
    ):
        return traced(
            query_key, gate, value, qk_weight, qk_bias, position_bias, causal, padding_mask, chunk_size,
            activation, weights_dropout, activate_value,
        )  # fmt: skip
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(
            op, Arguments(query_key, gate, value, qk_weight, qk_bias, position_bias, causal, padding_mask,
            chunk_size, activation, weights_dropout, activate_value),
        )  # fmt: skip
    kernels = family.kernels(query_key, gate, value, qk_weight, qk_bias, position_bias)
    if kernels is None:
        return laid_out(
            op, formula(query_key, gate, value, qk_weight, qk_bias, position_bias, causal=causal,
            padding_mask=padding_mask, chunk_size=chunk_size, activation=activation,
            weights_dropout=weights_dropout, activate_value=activate_value),
        )  # fmt: skip
    try:
        if is_grad_enabled() and (
            query_key.requires_grad
            or gate.requires_grad
            or value.requires_grad
            or qk_weight.requires_grad
            or qk_bias.requires_grad
            or position_bias.requires_grad
        ):
            return apply(
                kernels, False, query_key, gate, value, qk_weight, qk_bias, position_bias, causal,
                padding_mask, chunk_size, activation, weights_dropout, activate_value,
            )  # fmt: skip
        y, _ = run_kernels(
            kernels, query_key, gate, value, qk_weight, qk_bias, position_bias, causal, padding_mask,
            chunk_size, activation, weights_dropout, activate_value, False,
        )  # fmt: skip
    except Unlaunchable as error:
        family.give_up(error, query_key, gate, value, qk_weight, qk_bias, position_bias)
        return formula(
            query_key, gate, value, qk_weight, qk_bias, position_bias, causal=causal,
            padding_mask=padding_mask, chunk_size=chunk_size, activation=activation,
            weights_dropout=weights_dropout, activate_value=activate_value,
        )  # fmt: skip
    return y


def check(
    query_key: Tensor,
    gate: Tensor,
    value: Tensor,
    qk_weight: Tensor,
    qk_bias: Tensor,
    position_bias: Tensor,
    causal: bool,
    padding_mask: Tensor | None,
    chunk_size: int,
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"],
    weights_dropout: Tensor | None,
    activate_value: bool,
) -> None:
    """Raises if the arguments do not fit the declaration."""
    if type(causal) is not bool:
        op.wrong_flag("causal", causal)
    if type(chunk_size) is not int:
        op.wrong_int("chunk_size", chunk_size)
    if not (type(activation) is str and activation in ACTIVATION_CODES):
        op.wrong_choice("activation", activation, ACTIVATION_CODES)
    if type(activate_value) is not bool:
        op.wrong_flag("activate_value", activate_value)
    if (
        not isinstance(query_key, Tensor)
        or query_key.dtype not in FLOATING
        or query_key.layout is not torch.strided
    ):
        op.wrong_tensor("query_key", query_key)
    shape, right = query_key.shape, False
    if len(shape) == 3:
        L = shape[0]
        B = shape[1]
        D = shape[2]
        right = D >= 1
    if not right:
        op.wrong_shape("query_key", query_key, f"{listed('L', 'B', 'D')}, D >= 1")
    size, count = _chunks(
        Arguments(query_key, gate, value, qk_weight, qk_bias, position_bias, causal, padding_mask, chunk_size,
        activation, weights_dropout, activate_value),
    )  # fmt: skip
    if not isinstance(gate, Tensor) or gate.dtype not in FLOATING or gate.layout is not torch.strided:
        op.wrong_tensor("gate", gate)
    shape, right = gate.shape, False
    if len(shape) == 3:
        V = shape[2]
        right = shape[0] == L and shape[1] == B
    if not right:
        op.wrong_shape("gate", gate, listed(L, B, "V"))
    if gate.device != query_key.device:
        op.wrong_device("gate", gate, "query_key", query_key)
    if not isinstance(value, Tensor) or value.dtype not in FLOATING or value.layout is not torch.strided:
        op.wrong_tensor("value", value)
    if value.shape != (L, B, V):
        op.wrong_shape("value", value, listed(L, B, V))
    if value.device != query_key.device:
        op.wrong_device("value", value, "query_key", query_key)
    if (
        not isinstance(qk_weight, Tensor)
        or qk_weight.dtype not in FLOATING
        or qk_weight.layout is not torch.strided
    ):
        op.wrong_tensor("qk_weight", qk_weight)
    if qk_weight.shape != (2, D):
        op.wrong_shape("qk_weight", qk_weight, listed(2, D))
    if qk_weight.device != query_key.device:
        op.wrong_device("qk_weight", qk_weight, "query_key", query_key)
    if (
        not isinstance(qk_bias, Tensor)
        or qk_bias.dtype not in FLOATING
        or qk_bias.layout is not torch.strided
    ):
        op.wrong_tensor("qk_bias", qk_bias)
    if qk_bias.shape != (2, D):
        op.wrong_shape("qk_bias", qk_bias, listed(2, D))
    if qk_bias.device != query_key.device:
        op.wrong_device("qk_bias", qk_bias, "query_key", query_key)
    if padding_mask is not None:
        if (
            not isinstance(padding_mask, Tensor)
            or padding_mask.dtype not in BOOL
            or padding_mask.layout is not torch.strided
        ):
            op.wrong_tensor("padding_mask", padding_mask, "a bool tensor")
        if padding_mask.shape != (B, L):
            op.wrong_shape("padding_mask", padding_mask, listed(B, L))
        if padding_mask.device != query_key.device:
            op.wrong_device("padding_mask", padding_mask, "query_key", query_key)
    if weights_dropout is not None:
        if (
            not isinstance(weights_dropout, Tensor)
            or weights_dropout.dtype not in MASKS
            or weights_dropout.layout is not torch.strided
        ):
            op.wrong_tensor("weights_dropout", weights_dropout, "a bool or floating tensor")
        if weights_dropout.requires_grad:
            op.fail("weights_dropout", "a constant", "a tensor that requires a gradient")
        if weights_dropout.shape != (B, count, size, size):
            op.wrong_shape("weights_dropout", weights_dropout, listed(B, count, size, size))
        if weights_dropout.device != query_key.device:
            op.wrong_device("weights_dropout", weights_dropout, "query_key", query_key)
    if (
        not isinstance(position_bias, Tensor)
        or position_bias.dtype not in FLOATING
        or position_bias.layout is not torch.strided
    ):
        op.wrong_tensor("position_bias", position_bias)
    shape, right = position_bias.shape, False
    if len(shape) == 1:
        P = (shape[0] - (-1)) // 2
        right = (shape[0] - (-1)) % 2 == 0 and size <= P
    if not right:
        op.wrong_shape("position_bias", position_bias, f"{listed('2*P-1')}, P >= {size}")
    if position_bias.device != query_key.device:
        op.wrong_device("position_bias", position_bias, "query_key", query_key)


def traced(
    query_key, gate, value, qk_weight, qk_bias, position_bias, causal, padding_mask, chunk_size, activation,
    weights_dropout, activate_value,
):  # fmt: skip
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("toeplitz_attention", query_key, gate, value, qk_weight, qk_bias, position_bias):
        return formula(
            query_key, gate, value, qk_weight, qk_bias, position_bias, causal=causal,
            padding_mask=padding_mask, chunk_size=chunk_size, activation=activation,
            weights_dropout=weights_dropout, activate_value=activate_value,
        )  # fmt: skip
    y, _ = operator(
        query_key, gate, value, qk_weight, qk_bias, position_bias, causal, padding_mask, chunk_size,
        activation, weights_dropout, activate_value, is_grad_enabled() and (query_key.requires_grad or
        gate.requires_grad or value.requires_grad or qk_weight.requires_grad or qk_bias.requires_grad or
        position_bias.requires_grad),
    )  # fmt: skip
    return y


def run_kernels(
    kernels, query_key, gate, value, qk_weight, qk_bias, position_bias, causal, padding_mask, chunk_size,
    activation, weights_dropout, activate_value, keep,
):  # fmt: skip
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    y_dtype = promoted(value, gate)
    mixed_dtype = promoted(query_key, gate, value)
    y, mixed = _launch(
        op, kernels, make(Arguments, (query_key, gate, value, qk_weight, qk_bias, position_bias, causal,
        padding_mask, chunk_size, activation, weights_dropout, activate_value,)), y_dtype, keep,
    )  # fmt: skip
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    if mixed.dtype is not mixed_dtype:
        mixed = mixed.to(mixed_dtype)
    return y, mixed


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.value, a.gate), promoted(a.query_key, a.gate, a.value))


# --------------------------------------------------------------------------- gradients without the dispatcher
class ToeplitzAttention(Function):
    @staticmethod
    def forward(
        ctx, kernels, direct, query_key, gate, value, qk_weight, qk_bias, position_bias, causal, padding_mask,
        chunk_size, activation, weights_dropout, activate_value,
    ):  # fmt: skip
        if direct:
            y, mixed = kernels.forward(
                query_key, gate, value, qk_weight, qk_bias, position_bias, padding_mask, weights_dropout,
                causal, chunk_size, ACTIVATION_CODES[activation], activate_value, True,
            )  # fmt: skip
        else:
            y, mixed = run_kernels(
                kernels, query_key, gate, value, qk_weight, qk_bias, position_bias, causal, padding_mask,
                chunk_size, activation, weights_dropout, activate_value, True,
            )  # fmt: skip
        y = not_a_view(y)
        ctx.save_for_backward(
            query_key, gate, value, qk_weight, qk_bias, position_bias, padding_mask, weights_dropout, mixed
        )
        ctx.rest = kernels, direct, causal, chunk_size, activation, activate_value
        return y

    @staticmethod
    def backward(ctx, grad_y, *_):
        if is_grad_enabled():
            refuse_double_backward("toeplitz_attention")
        # once: a checkpoint gives them one time
        query_key, gate, value, qk_weight, qk_bias, position_bias, padding_mask, weights_dropout, mixed = (
            ctx.saved_tensors
        )
        kernels, direct, causal, chunk_size, activation, activate_value = ctx.rest
        d_query_key, d_gate, d_value, d_qk_weight, d_qk_bias, d_position_bias = node_gradients(
            op, kernels, (grad_y,), make(Saved, (query_key, gate, value, qk_weight, qk_bias, position_bias,
            padding_mask, weights_dropout, mixed, causal, chunk_size, activation, activate_value,)),
            ctx.needs_input_grad[2:],
        )  # fmt: skip
        return (
            None,
            None,
            d_query_key,
            d_gate,
            d_value,
            d_qk_weight,
            d_qk_bias,
            d_position_bias,
            None,
            None,
            None,
            None,
            None,
            None,
        )


def differentiate(kernels, grads, saved, needs=None):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    needs = make(Arguments, needs)
    d_query_key, d_gate, d_value, d_qk_weight, d_qk_bias, d_position_bias = _gradients(
        op, kernels, grads, saved, needs
    )
    d_query_key = back(d_query_key, saved.query_key)
    d_gate = back(d_gate, saved.gate)
    d_value = back(d_value, saved.value)
    d_qk_weight = back(d_qk_weight, saved.qk_weight)
    d_qk_bias = back(d_qk_bias, saved.qk_bias)
    d_position_bias = back(d_position_bias, saved.position_bias)
    return d_query_key, d_gate, d_value, d_qk_weight, d_qk_bias, d_position_bias


apply = applied(ToeplitzAttention)


# --------------------------------------------------------------------------- the registered operator
def fake(
    query_key, gate, value, qk_weight, qk_bias, position_bias, causal=True, padding_mask=None, chunk_size=0,
    activation='silu', weights_dropout=None, activate_value=False, keep=False,
):  # fmt: skip
    keep = keep and family.kernels(query_key, gate, value, qk_weight, qk_bias, position_bias) is not None
    L = query_key.shape[0]
    B = query_key.shape[1]
    size, count = _chunks(
        Arguments(query_key, gate, value, qk_weight, qk_bias, position_bias, causal, padding_mask, chunk_size,
        activation, weights_dropout, activate_value),
    )  # fmt: skip
    V = gate.shape[2]
    return torch.empty((L, B, V), dtype=promoted(value, gate), device=query_key.device), torch.empty(
        (L, B, V) if keep else (0,), dtype=promoted(query_key, gate, value), device=query_key.device
    )


op.serve(
    toeplitz_attention,
    Written(
        Arguments=Arguments,
        check=check,
        run_kernels=run_kernels,
        fake=fake,
        result_dtypes=result_dtypes,
        Saved=Saved,
        apply=apply,
        differentiate=differentiate,
        results=("y", "mixed"),
        deciding=("query_key", "gate", "value", "qk_weight", "qk_bias", "position_bias"),
        differentiable=("query_key", "gate", "value", "qk_weight", "qk_bias", "position_bias"),
        graded={"y": ""},
        saves=(
            "query_key",
            "gate",
            "value",
            "qk_weight",
            "qk_bias",
            "position_bias",
            "padding_mask",
            "weights_dropout",
            "mixed",
        ),
        kept=("mixed",),
        asks=True,
    ),
)
operator = register_op(
    op,
    "toeplitz_attention(Tensor query_key, Tensor gate, Tensor value, Tensor qk_weight, Tensor qk_bias, "
    "Tensor position_bias, bool causal=True, Tensor? padding_mask=None, SymInt chunk_size=0, str "
    'activation="silu", Tensor? weights_dropout=None, bool activate_value=False, bool keep=False) -> '
    "(Tensor, Tensor)",
    "toeplitz_attention_backward(Tensor grad_y, Tensor query_key, Tensor gate, Tensor value, Tensor "
    "qk_weight, Tensor qk_bias, Tensor position_bias, Tensor? padding_mask, Tensor? weights_dropout, "
    "Tensor mixed, bool causal, SymInt chunk_size, str activation, bool activate_value, bool[] needs) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
