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


BOTH = {"direction": 2} | dict.fromkeys(("damping", "decay", "expansion", "projection"), torch.zeros(6, 4))
STATE = torch.zeros(2, 3, 4)


@built
@pytest.mark.parametrize(
    ("op", "changed", "message"),
    [
        ("ema_scan", {}, "expected CUDA tensors of one device"),
        ("complex_ema_scan", {}, "expected CUDA tensors of one device"),
        # the checks of the declaration, which the CPU's kernels have too: tests/ops/test_native_checks.py
        ("ema_scan", {"decay": torch.zeros(3, 5)}, "decay is not"),
        ("complex_ema_scan", {"gamma": torch.zeros(3, 4)}, "gamma is not"),
        ("ema_scan", BOTH | {"state": STATE}, "no state with a truncation or in both directions"),
        ("ema_scan", {"truncation": 2, "state": STATE}, "no state with a truncation or in both directions"),
    ],
)
def test_both_passes_refuse(op, changed, message):
    forward, backward = (getattr(torch.ops.fastasr_cuda, f"{op}_{way}") for way in ("forward", "backward"))
    arguments = _arguments(op, **changed)
    with pytest.raises(ValueError, match=f"{op}_forward: {message}"):
        forward.default._op_dk(CUDA, *arguments, False)
    with pytest.raises(ValueError, match=f"{op}_backward: {message}"):
        backward.default._op_dk(CUDA, torch.zeros(5, 2, 3), None, *arguments)


@built
def test_a_state_that_is_asked_for():
    forward = torch.ops.fastasr_cuda.ema_scan_forward.default
    backward = torch.ops.fastasr_cuda.ema_scan_backward.default
    for changed in (BOTH, {"truncation": 2}):
        with pytest.raises(ValueError, match="no state with"):
            forward._op_dk(CUDA, *_arguments(**changed), True)
        with pytest.raises(ValueError, match="no state with"):
            backward._op_dk(CUDA, torch.zeros(5, 2, 3), STATE, *_arguments(**changed))


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
