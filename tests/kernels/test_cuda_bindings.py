# SPDX-License-Identifier: Apache-2.0
"""The CUDA side of the library without a GPU: it loads, says why it serves nothing, and refuses wrong arguments.

The arguments are checked before anything touches a device, so the CUDA implementation is called here on CPU tensors.
"""

import pytest
import torch

import fastasr
from fastasr import ops
from fastasr.ops import _dispatch

CUDA = torch._C.DispatchKey.CUDA

built = pytest.mark.skipif(
    _dispatch.native_build_info().get("cuda_architectures") is None,
    reason="the native library is not built, or built without CUDA (no nvcc)",
)


_STATES, _SCALARS = torch.zeros(3, 4), torch.zeros(3)
# op -> the tensors of its parameters
PARAMETERS = {
    "ema_scan": {
        **dict.fromkeys(("damping", "decay", "expansion", "projection"), _STATES),
        "residual": _SCALARS,
    },
    "complex_ema_scan": {
        "alpha": _STATES,
        "delta": _STATES,
        "theta": _SCALARS,
        "gamma": torch.zeros(3, 4, 2),
        "omega": _SCALARS,
    },
}


def _arguments(op: str = "ema_scan", **changed) -> list:
    values = {"x": torch.zeros(5, 2, 3), **PARAMETERS[op], "state": None, "mask": None}
    values |= dict.fromkeys(("truncation", "direction", "activation", "layout"), 0)
    return list((values | changed).values())


WRONG = [
    ("x", torch.zeros(5, 6), "x: expected three dimensions, got 2"),
    ("x", torch.zeros(5, 2, 3, dtype=torch.int32), "unsupported dtype"),
    ("x", torch.zeros(5, 2, 4), "damping: expected 4 in dimension 0, got 3"),
    ("damping", torch.zeros(3), "damping: expected \\(rows, states\\), got 1 dimensions"),
    ("damping", torch.zeros(3, 0), "damping: expected 1 to 64 states, got 0"),
    ("damping", torch.zeros(3, 65), "damping: expected 1 to 64 states, got 65"),
    ("decay", torch.zeros(3, 5), "decay: expected 4 in dimension 1, got 5"),
    ("decay", torch.zeros(3, 4, dtype=torch.float64), "decay: expected float32"),
    ("expansion", torch.zeros(4, 3).t(), "expansion: expected 2 dimensions, contiguous"),
    ("projection", torch.zeros(3, 4, 1), "projection: expected 2 dimensions"),
    ("residual", torch.zeros(1), "residual: expected 3 in dimension 0, got 1"),
    ("state", torch.zeros(2, 3, 5), "state: expected 4 in dimension 2, got 5"),
    ("mask", torch.zeros(2, 5), "mask: expected bool"),
    ("mask", torch.zeros(5, 2, dtype=torch.bool), "mask: expected 2 in dimension 0, got 5"),
    ("truncation", -1, "truncation: expected 0 or more, got -1"),
    ("direction", 3, "direction: expected 0, 1 or 2, got 3"),
    ("activation", 5, "activation: expected 0 to 4, got 5"),
    ("layout", 3, "layout: expected 0, 1 or 2, got 3"),
    ("x", torch.zeros(5, 2, 3), "x: expected a CUDA tensor"),
]


COMPLEX_WRONG = [
    ("x", torch.zeros(5, 2, 4), "alpha: expected 4 in dimension 0, got 3"),
    ("alpha", torch.zeros(3, 65), "alpha: expected 1 to 64 states, got 65"),
    ("delta", torch.zeros(3, 5), "delta: expected 4 in dimension 1, got 5"),
    ("theta", torch.zeros(3, 4), "theta: expected 1 dimensions, contiguous"),
    ("theta", torch.zeros(3, dtype=torch.float64), "theta: expected float32"),
    ("gamma", torch.zeros(3, 4), "gamma: expected 3 dimensions, contiguous"),
    ("gamma", torch.zeros(3, 4, 3), "gamma: expected 2 in dimension 2, got 3"),
    ("omega", torch.zeros(1), "omega: expected 3 in dimension 0, got 1"),
    ("state", torch.zeros(2, 3, 4), "state: expected 4 dimensions, contiguous"),
    ("state", torch.zeros(2, 3, 4, dtype=torch.complex64), "state: expected float32"),
    ("mask", torch.zeros(5, 2, dtype=torch.bool), "mask: expected 2 in dimension 0, got 5"),
    ("x", torch.zeros(5, 2, 3), "x: expected a CUDA tensor"),
]


@built
@pytest.mark.parametrize(
    ("op", "name", "value", "message"),
    [("ema_scan", *row) for row in WRONG] + [("complex_ema_scan", *row) for row in COMPLEX_WRONG],
)
def test_both_passes_name_what_is_wrong(op, name, value, message):
    forward, backward = (getattr(torch.ops.fastasr_cuda, f"{op}_{way}") for way in ("forward", "backward"))
    arguments = _arguments(op, **{name: value})
    with pytest.raises(ValueError, match=f"{op}_forward: {message}"):
        forward.default._op_dk(CUDA, *arguments, False)
    with pytest.raises(ValueError, match=f"{op}_backward: {message}"):
        backward.default._op_dk(CUDA, torch.zeros(5, 2, 3), None, *arguments)


@built
def test_the_gradient_of_a_complex_state():
    backward = torch.ops.fastasr_cuda.complex_ema_scan_backward.default
    grad, grad_state = torch.zeros(5, 2, 3), torch.zeros(2, 3, 4, 3)
    with pytest.raises(ValueError, match="grad_state: expected 2 in dimension 3, got 3"):
        backward._op_dk(CUDA, grad, grad_state, *_arguments("complex_ema_scan"))


@built
def test_options_that_exclude_each_other():
    forward = torch.ops.fastasr_cuda.ema_scan_forward.default
    backward = torch.ops.fastasr_cuda.ema_scan_backward.default
    both = dict.fromkeys(("damping", "decay", "expansion", "projection"), torch.zeros(6, 4)) | {
        "direction": 2
    }
    state = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="need_state: expected false"):
        forward._op_dk(CUDA, *_arguments(**both), True)
    with pytest.raises(ValueError, match="need_state: expected false"):
        forward._op_dk(CUDA, *_arguments(truncation=2), True)
    with pytest.raises(ValueError, match="state: expected none with both directions"):
        forward._op_dk(CUDA, *_arguments(**both, state=state), False)
    with pytest.raises(ValueError, match="state: expected none with truncation"):
        forward._op_dk(CUDA, *_arguments(truncation=2, state=state), False)
    grad = torch.zeros(5, 2, 3)
    with pytest.raises(ValueError, match="grad_state: expected none"):
        backward._op_dk(CUDA, grad, state, *_arguments(truncation=2))
    with pytest.raises(ValueError, match="grad: expected 5 in dimension 0, got 4"):
        backward._op_dk(CUDA, grad[:4], None, *_arguments())
    with pytest.raises(ValueError, match="grad: expected x's dtype"):
        backward._op_dk(CUDA, grad.double(), None, *_arguments())


@built
def test_schemas_have_no_defaults():
    for name in (f"{op}_{way}" for op in PARAMETERS for way in ("forward", "backward")):
        schema = getattr(torch.ops.fastasr_cuda, name).default._schema
        assert not any(argument.has_default_value() for argument in schema.arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_table_says_why_cuda_is_not_used():
    row = next(r for r in _dispatch.table() if r["op"] == "ema_scan" and r["backend"] == "cuda")
    assert not row["available"]
    assert row["reason"]
    x, p = torch.zeros(5, 2, 3), torch.zeros(3, 4)
    with fastasr.backend("cuda"), pytest.raises(RuntimeError, match="cuda: serves cuda tensors only"):
        ops.ema_scan(x, p, p, p, p)
