# SPDX-License-Identifier: Apache-2.0
"""The matrix product around a kernel: torch's, oneDNN's or fastasr's own, whichever was measured fastest on this
machine.

torch's float32 products go through MKL, which on some CPUs takes a slow path; the oneDNN inside the same torch does
not. fastasr's own product (csrc/cpu/gemm/gemm.h) packs every operand, whatever its strides, and writes to memory that
was used before, which is faster for large results and for transposed operands, as gradients have. The choice is
measured, never guessed from a vendor name: the first call of each shape class runs all candidates on its own operands
(a few calls' time), and the winner is kept on disk by CPU, torch version and thread count. It must beat torch by 3 % to
be taken. Only float32 on CPU has a choice; torch computes everything else.

Environment: ``FASTASR_GEMM=auto|torch|onednn|native``, ``FASTASR_CACHE=<folder>`` (default: the user's cache folder).
"""

import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.ops._dispatch import reason_cpu

_log = logging.getLogger("fastasr")
_MARGIN = 0.97
_REPETITIONS = 3
_BUDGET_S = 0.5
_SMALL = 1 << 16
_CLEAR = 1.1  # Stop repeating a candidate once it is this much slower than the best.
_HOPELESS = 8.0  # Do not repeat a candidate whose first run is this many times slower.


# --------------------------------------------------------------------------- the candidates
# Each takes 2-D or wider operands: forward(x, w, b) = x wᵀ + b, input_grad(g, w) = g w,
# weight_grad(g, x) = gᵀ x with g (M, N), x (M, K).
def _torch_forward(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return F.linear(x, w, b)


def _torch_input_grad(g: Tensor, w: Tensor) -> Tensor:
    return torch.matmul(g, w)


def _torch_weight_grad(g: Tensor, x: Tensor) -> Tensor:
    return torch.mm(g.t(), x)


_linear = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
_linear_add = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "binary", None)

# oneDNN adds up a whole reduction in one chain: its error is 1.6 times that of MKL, which adds in blocks, at 512 terms
# and 2.2 times at 3184. In blocks of at most 192 terms the errors are equal, so only that form is a candidate.
_CHAIN = 192


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    count = -(-length // _CHAIN)
    return ((length * i // count, length * (i + 1) // count) for i in range(count))


def _onednn(pairs: Iterator[tuple[Tensor, Tensor]], bias: Tensor | None) -> Tensor:
    """Returns Σ over pairs (a, b) of a bᵀ, plus bias; oneDNN adds each product to the sum."""
    out = None
    for a, b in pairs:
        out = _linear(a, b, bias, "none", [], "") if out is None else _linear_add(a, out, b, None, "add")
    return out


def _onednn_forward(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    if b is not None and not b.is_contiguous():
        b = b.contiguous()  # mkldnn::_linear_pointwise ignores the bias's stride
    k = w.shape[1]
    if k <= _CHAIN:
        return _linear(x, w, b, "none", [], "")
    rows = x.reshape(-1, k)
    # with a weight whose rows are not adjacent, oneDNN runs its reference kernel, a thousand times slower
    y = _onednn(((rows[:, i:j], w[:, i:j].contiguous()) for i, j in _blocks(k)), b)
    return y.view(*x.shape[:-1], w.shape[0])


def _onednn_input_grad(g: Tensor, w: Tensor) -> Tensor:
    n = w.shape[0]
    if n <= _CHAIN:
        return _linear(g, w.t(), None, "none", [], "")
    rows = g.reshape(-1, n)
    return _onednn(((rows[:, i:j], w[i:j].t()) for i, j in _blocks(n)), None).view(*g.shape[:-1], w.shape[1])


def _onednn_weight_grad(g: Tensor, x: Tensor) -> Tensor:
    return _onednn(((g[i:j].t(), x[i:j].t()) for i, j in _blocks(g.shape[0])), None)


def _native(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.fastasr_cpu.gemm.default(a, b, bias)


def _native_forward(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    n, k = w.shape
    b = None if b is None else b.contiguous()
    return _native(x.reshape(-1, k), w.t(), b).view(*x.shape[:-1], n)


def _native_input_grad(g: Tensor, w: Tensor) -> Tensor:
    n, k = w.shape
    return _native(g.reshape(-1, n), w, None).view(*g.shape[:-1], k)


def _native_weight_grad(g: Tensor, x: Tensor) -> Tensor:
    return _native(g.t(), x, None)


_CANDIDATES: dict[str, dict[str, Callable[..., Tensor]]] = {
    "forward": {"torch": _torch_forward, "onednn": _onednn_forward, "native": _native_forward},
    "input_grad": {"torch": _torch_input_grad, "onednn": _onednn_input_grad, "native": _native_input_grad},
    "weight_grad": {
        "torch": _torch_weight_grad,
        "onednn": _onednn_weight_grad,
        "native": _native_weight_grad,
    },
}


@cache
def onednn_reason() -> str:
    """Says why oneDNN cannot be a candidate; "" when it can. The op is private to torch, so it is tried,
    not assumed.
    """
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    if _linear is None or _linear_add is None:
        return "this torch has no mkldnn::_linear_pointwise"
    try:
        with torch.no_grad():  # small integers: every order of summation gives the same result
            x = torch.arange(2.0 * (_CHAIN + 2)).reshape(2, -1) % 5
            w = torch.arange(3.0 * (_CHAIN + 2)).reshape(3, -1) % 7
            right = torch.equal(_onednn_forward(x, w, w.new_ones(3)), x @ w.t() + 1)
            right &= torch.equal(_onednn_input_grad(x, w.t()), x @ w.t())
            right &= torch.equal(_onednn_weight_grad(x.t(), w.t()), x @ w.t())
    except Exception as error:  # a private op may change its signature, which only removes the candidate
        return f"mkldnn::_linear_pointwise failed its probe: {error}"
    return "" if right else "mkldnn::_linear_pointwise gave a wrong result in its probe"


@cache
def _usable() -> tuple[str, ...]:
    """Returns the candidates that this machine has, torch's first."""
    others = {"onednn": onednn_reason(), "native": reason_cpu("gemm")}
    return ("torch", *(name for name, why_not in others.items() if not why_not))


def reason() -> str:
    """Says why there is nothing to choose from; "" when there is."""
    if len(_usable()) > 1:
        return ""
    return f"{onednn_reason()}, and {reason_cpu('gemm')}"


# --------------------------------------------------------------------------- what has been measured
@cache
def _machine() -> str:
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "cpu family", "model\t", "flags")):
                name += line
                if line.startswith("flags"):
                    break
    except OSError:
        pass
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def cache_file() -> Path:
    """Returns the path of the measured choices."""
    root = os.environ.get("FASTASR_CACHE")
    if not root:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastasr"
    version = torch.__version__.replace("+", "-")
    return Path(root) / f"products-{_machine()}-torch{version}.json"


_choices: dict[tuple, Callable[..., Tensor]] = {}
_saved: dict[str, str] | None = None


def _read(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in content.items() if v in _usable()} if isinstance(content, dict) else {}


def _remember(key: str, choice: str) -> None:
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        merged = _read(path) | {key: choice}  # another process may have written meanwhile
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(merged, indent=1, sort_keys=True))
        scratch.replace(path)
    except OSError as error:
        _log.debug("measured GEMM choices are not kept on disk: %s", error)


def forget() -> None:
    """Drops every remembered choice of this process; the next call of each shape class reads or measures
    again.
    """
    global _saved
    _choices.clear()
    _saved = None


def _half_octave(n: int) -> int:
    return round(2 * math.log2(n))


def _decide(key: tuple, operation: str, operands: tuple) -> Callable[..., Tensor]:
    global _saved
    policy = os.environ.get("FASTASR_GEMM", "auto")
    if policy not in ("auto", "torch", "onednn", "native"):
        raise ValueError(f"FASTASR_GEMM: expected auto, torch, onednn or native, got {policy!r}")
    candidates = {name: _CANDIDATES[operation][name] for name in _usable()}
    if policy != "auto" or len(candidates) == 1:
        return candidates.get(policy, candidates["torch"])
    _, m, n, k, threads = key
    name = f"{operation} {m} {_half_octave(n)} {_half_octave(k)} {threads}"
    if _saved is None:
        _saved = _read(cache_file())
    choice = _saved.get(name)
    if choice is None:
        choice = _saved[name] = _measure(candidates, operands)
        _remember(name, choice)
    return candidates[choice]


def _timed(f: Callable[..., Tensor], operands: tuple) -> float:
    begin = time.perf_counter()
    f(*operands)
    return time.perf_counter() - begin


def _measure(candidates: dict[str, Callable[..., Tensor]], operands: tuple) -> str:
    start = time.perf_counter()
    # the first run of each candidate packs, allocates and creates primitives
    first = {name: max(_timed(f, operands), 1e-7) for name, f in candidates.items()}
    left = {name: f for name, f in candidates.items() if first[name] <= _HOPELESS * first["torch"]}
    best = dict.fromkeys(left, math.inf)
    for _ in range(_REPETITIONS):
        if len(left) == 1 or time.perf_counter() - start > _BUDGET_S:
            break
        for name, f in left.items():
            best[name] = min(best[name], _timed(f, operands))
        left = {
            name: f for name, f in left.items() if name == "torch" or best[name] <= _CLEAR * best["torch"]
        }
    winner = min(best, key=best.get)
    return winner if best[winner] < _MARGIN * best["torch"] else "torch"


def _call(operation: str, m: int, n: int, k: int, *operands: Tensor | None) -> Tensor:
    x = operands[0]
    # the cost of a small product is its call overhead, and torch's is the smallest; deterministic algorithms need the
    # same choice on every machine and in every run
    if (
        m * n * k < _SMALL
        or x.dtype is not torch.float32
        or not x.is_cpu
        or torch.are_deterministic_algorithms_enabled()
    ):
        return _CANDIDATES[operation]["torch"](*operands)
    key = (operation, m.bit_length(), n, k, torch.get_num_threads())
    f = _choices.get(key)
    if f is None:
        f = _choices[key] = _decide(key, operation, operands)
    return f(*operands)


# --------------------------------------------------------------------------- what ops call, below autograd
def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns x weightᵀ + bias for x (..., K), weight (N, K)."""
    n, k = weight.shape
    if not k or x.numel() * n < _SMALL:
        return F.linear(x, weight, bias)
    return _call("forward", x.numel() // k, n, k, x, weight, bias)


def input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """Returns grad weight for grad (..., N), weight (N, K)."""
    n, k = weight.shape
    if grad.numel() * k < _SMALL:
        return torch.matmul(grad, weight)
    return _call("input_grad", grad.numel() // n, k, n, grad, weight)


def weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """Returns gradᵀ x over all leading dimensions, for grad (..., N), x (..., K)."""
    if grad.dim() != 2:
        rows = grad.shape[:-1].numel()
        grad, x = grad.reshape(rows, grad.shape[-1]), x.reshape(rows, x.shape[-1])
    rows, n = grad.shape
    return _call("weight_grad", n, x.shape[1], rows, grad, x)
