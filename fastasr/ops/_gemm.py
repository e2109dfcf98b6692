# SPDX-License-Identifier: Apache-2.0
"""The matrix product around a kernel: torch's or one of fastasr's own, whichever was measured faster on this machine.

torch's float32 products go through MKL, which takes a slow path on some CPUs. fastasr's own product
(csrc/cpu/gemm/gemm.h) takes operands of any strides, reads long rows where they lie, packs the rest and writes to
memory that was used before, which is faster for large results and for transposed operands, as gradients have. A third
one, for fewer than 16 rows as in a stream's chunk, reads each weight once, where it lies. The choice is measured, never
guessed from a vendor name: the first call of each shape class runs both on its own operands (a few calls' time), and
the winner is kept on disk by CPU, torch version and thread count. It must beat torch by 3 % to be taken. Only float32
on CPU has a choice; torch computes everything else.

Environment: ``FASTASR_GEMM=auto|torch|native``, ``FASTASR_CACHE=<folder>`` (default: the user's cache folder).
"""

import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr import files, processor
from fastasr.ops import _dispatch, _reduced_weights
from fastasr.ops._dispatch import reason_cpu

_log = logging.getLogger("fastasr")
_MARGIN = 0.97
_REVISION = 7  # of fastasr's product and of how it is measured: choices of another one are not read
_REPETITIONS = 3  # at least, and more of them as long as all together take less than _SHORT_S
_SHORT_S = 0.05
_BUDGET_S = 0.5
_MOST_FEW = 15  # rows: cpu::kFewRows
_FEW_COLUMNS = 14  # as many rows as a tile of registers has with AVX-512
SMALL = 1 << 17  # one row of 192 to 512 is below it
_LARGE = 96 * SMALL  # torch multiplies smaller matrices of a batch at once, faster than fastasr one by one
CHAINS = 12  # columns: where a weight's gradient has fewer, torch adds in one chain of floats
_CLEAR = 1.1  # Stop after the fewest repetitions once fastasr's product is this much slower.

reason = partial(reason_cpu, "gemm")  # says why there is nothing to choose from; "" when there is


# --------------------------------------------------------------------------- the two products
# Operands have two or more dimensions: forward(x, w, b) = x wᵀ + b, input_grad(g, w) = g w, weight_grad(g, x) = gᵀ x
# with g (M, N), x (M, K).
def _native(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = a.reshape(-1, a.shape[-1])
    y = torch.ops.fastasr_cpu.gemm.default(rows, b, None if bias is None else bias.contiguous())
    return y.view(*a.shape[:-1], b.shape[1])


def _few_rows(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    if w.stride(1) != 1 or x.dim() > 3:
        return F.linear(x, w, b)
    return torch.ops.fastasr_cpu.linear_few_rows.default(x, w, None if b is None else b.contiguous())


def _weight_grad(g: Tensor, x: Tensor, chain: int = 128) -> Tensor:
    if len(g) == 1:  # torch's product of one row with another takes 1.7 times as long
        return g.t() * x
    if g.shape[1] >= CHAINS or len(g) < 2 * chain:
        return torch.mm(g.t(), x)
    a, b = (t[len(g) % chain :].unflatten(0, (-1, chain)) for t in (g, x))
    return torch.addmm(torch.bmm(a.mT, b).sum(0), g[: len(g) % chain].t(), x[: len(g) % chain])


def _conv_gradients(
    g: Tensor, x: Tensor, w: Tensor, stride: tuple, padding: tuple, mask: list[bool]
) -> tuple:
    sizes = [len(w)], stride, padding, (1, 1), False, (0, 0), 1
    return torch.ops.aten.convolution_backward.default(g, x, w, *sizes, mask)


def _conv_weight_grad(*operands: Tensor | tuple) -> tuple[Tensor, Tensor]:
    return _conv_gradients(*operands, [False, True, True])[1:]


def _planes(g: Tensor, x: Tensor, w: Tensor, stride: tuple, padding: tuple) -> tuple[Tensor, Tensor]:
    """Reorders maps whose channels are last: on AVX2 torch may then take less time, the copies included."""
    return _conv_weight_grad(g.contiguous(), x.contiguous(), w.contiguous(), stride, padding)


_PRODUCTS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "torch": {
        "forward": F.linear,
        "input_grad": torch.matmul,
        "weight_grad": _weight_grad,
        "conv_weight_grad": _conv_weight_grad,
    },
    "native": {
        "forward": lambda x, w, b: _native(x, w.t(), b),
        "input_grad": _native,
        "weight_grad": lambda g, x: _native(g.t(), x),
        "conv_weight_grad": _planes,
    },
    "few rows": {"forward": _few_rows},  # "native" of fewer than 16 rows; its bits are other ones
}


# --------------------------------------------------------------------------- what has been measured
@cache
def _machine(*facts: Path) -> str:
    """Returns a hash of the processor's name and features, from the file ``facts`` if one is given."""
    known = ("model name", "cpu family", "model", "flags", "CPU ", "Features")  # the last two: Arm
    fields = processor.fields(*facts)
    name = platform.processor() or platform.machine()
    name += "".join(f"{key}: {value}" for key, value in fields.items() if key.startswith(known))
    # FASTASR_SIMD may hold kernels of another set than the machine's widest
    name += _dispatch.native_build_info().get("simd_set", "")
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def cache_file() -> Path:
    """Returns the path of the measured choices."""
    root = os.environ.get("FASTASR_CACHE")
    if not root:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastasr"
    version = torch.__version__.replace("+", "-")
    return Path(root) / f"products{_REVISION}-{_machine()}-torch{version}.json"


_choices: dict[tuple, Callable[..., Tensor]] = {}
_forgotten = 0
_saved: dict[str, str] | None = None


def _read(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _remember(key: str, choice: str) -> None:
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        merged = _read(path) | {key: choice}  # another process may have written meanwhile
        files.write(path, json.dumps(merged, indent=1, sort_keys=True), durable=False)
    except OSError as error:
        _log.debug("measured GEMM choices are not kept on disk: %s", error)


def forget() -> None:
    """Drops every remembered choice of this process: the next call of each shape class reads or measures again."""
    global _saved, _forgotten
    _choices.clear()
    _dispatch.FAMILIES["linear"].chosen.clear()
    _saved = None
    _forgotten += 1


def generation() -> int:
    """Counts the calls of ``forget``: choices hold as long as the number."""
    return _forgotten


def _decide(key: tuple, operands: tuple | None) -> str:
    """Returns the product for calls of this class, which is measured on the operands; without any, "" if that has not
    been done yet.
    """
    global _saved
    policy = os.environ.get("FASTASR_GEMM", "auto")
    if policy not in ("auto", "torch", "native"):
        raise ValueError(f"FASTASR_GEMM: expected auto, torch or native, got {policy!r}")
    if policy == "torch" or reason():
        return "torch"
    operation, m, *sizes, threads = key
    # Its kernel takes 8 outputs or more, and a class of 16 has none with fewer. There "native" is no candidate: MKL's
    # sums of so few rows may be short ones, and its error was 2.4 times theirs on an Intel processor.
    few = operation == "forward" and 1 << m <= _MOST_FEW + 1 and sizes[0] >= 16
    own = "few rows" if few and not reason_cpu("linear_few_rows") else "native"
    if policy == "native":
        return own
    half_octaves = " ".join(str(round(2 * math.log2(size))) for size in sizes)
    name = f"{operation} {m} {half_octaves} {threads}"
    if _saved is None:
        _saved = _read(cache_file())
    products = ["torch", own]
    # the file may be damaged, or of a version of fastasr with other products
    if _saved.get(name) not in products:
        if operands is None:
            return ""
        _saved[name] = _measure(operation, operands, products)
        _remember(name, _saved[name])
    return _saved[name]


def _timed(product: str, operation: str, operands: tuple) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter  # without other processes
    begin = clock()
    _PRODUCTS[product][operation](*operands)
    return clock() - begin


def _measure(operation: str, operands: tuple, products: list[str]) -> str:
    start = time.perf_counter()
    best = dict.fromkeys(products, math.inf)
    for product in best:  # the first run packs and allocates
        _timed(product, operation, operands)
    theirs, ours, taken = math.inf, math.inf, ""
    for repetition in range(5 * _REPETITIONS):
        spent, clear = time.perf_counter() - start, ours > _CLEAR * theirs
        # one call may have waited for another process: a short product is measured often
        if spent > _BUDGET_S or (repetition >= _REPETITIONS and (spent > _SHORT_S or clear)):
            break
        best = {p: min(seconds, _timed(p, operation, operands)) for p, seconds in best.items()}
        theirs = best["torch"]
        ours, taken = min((seconds, product) for product, seconds in best.items() if product != "torch")
    return taken if ours < _MARGIN * theirs else "torch"


def _chosen(key: tuple, operands: tuple | None) -> Callable[..., Tensor] | None:
    """Returns the product of this class, chosen now if there are operands. None before the choice."""
    f = _choices.get(key)
    if f is None and (name := _decide(key, operands)):
        f = _choices[key] = _PRODUCTS[name][key[0]]
    return f


def _choice(operation: str, m: int, n: int, k: int, *operands: Tensor | None) -> Callable[..., Tensor]:
    x = operands[0]
    # deterministic algorithms need the same choice on every machine and in every run
    if x.dtype is not torch.float32 or not x.is_cpu or torch.are_deterministic_algorithms_enabled():
        return _PRODUCTS["torch"][operation]
    return _chosen((operation, m.bit_length(), n, k, torch.get_num_threads()), operands)


def offer(operation: str, **products: Callable[..., Tensor]) -> None:
    """Adds an operation, ``torch`` and ``native``, among which ``is_torch`` chooses."""
    for name, product in products.items():
        _PRODUCTS[name][operation] = product


def is_torch(key: tuple, *operands: Tensor | None) -> bool | None:
    """Says whether torch's product serves calls of this operation, sizes and threads. None before the choice, which is
    made now if there are operands.
    """
    f = _chosen(key, operands or None)
    return None if f is None else f is _PRODUCTS["torch"][key[0]]


def known(operation: str, m: int, n: int, k: int) -> str | None:
    """Returns the name of the product that serves such a call in float32 on the CPU, None before one has been chosen.
    ``forward`` has m rows, n outputs and k inputs; ``input_grad`` multiplies (m, k) by (k, n).
    """
    if m * n * k < SMALL or torch.are_deterministic_algorithms_enabled():
        return "torch"
    f = _choices.get((operation, m.bit_length(), n, k, torch.get_num_threads()))
    if f is None:
        return None
    return next(name for name, products in _PRODUCTS.items() if products.get(operation) is f)


# --------------------------------------------------------------------------- what ops call, below autograd
# The cost of a small product is its call overhead, and torch's is the smallest.
def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns x weightᵀ + bias for x (..., K), weight (N, K)."""
    if _reduced_weights.copies and (copy := _reduced_weights.of(x, weight)) is not None:
        return copy.product(x, bias)
    n, k = weight.shape
    if not k or x.numel() * n < SMALL:
        return F.linear(x, weight, bias)
    return _choice("forward", x.numel() // k, n, k, x, weight, bias)(x, weight, bias)


def input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """Returns grad weight for grad (..., N), weight (N, K)."""
    n, k = weight.shape
    if grad.numel() * k < SMALL:
        return torch.matmul(grad, weight)
    return _choice("input_grad", grad.numel() // n, k, n, grad, weight)(grad, weight)


def weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """Returns gradᵀ x over all leading dimensions, for grad (..., N), x (..., K)."""
    if grad.dim() != 2:
        grad, x = (t.reshape(t.shape[:-1].numel(), t.shape[-1]) for t in (grad, x))
    (rows, n), k = grad.shape, x.shape[1]
    if k <= _FEW_COLUMNS < n:  # they fill more of a tile of registers as rows
        return weight_grad(x, grad).t().contiguous()
    if grad.numel() * k < SMALL:
        return _weight_grad(grad, x)
    return _choice("weight_grad", n, k, rows, grad, x)(grad, x)


def conv2d_grads(
    grad: Tensor, x: Tensor, weight: Tensor, stride: tuple, padding: tuple, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradients of x, weight and bias of a convolution in one group without dilation."""
    dx = dw = db = None
    if needs[0]:
        dx = _conv_gradients(grad, x, weight, stride, padding, [True, False, False])[0]
    if needs[1] or needs[2]:
        outputs, inputs = len(weight), weight[0].numel()
        operands = grad, x, weight, stride, padding
        dw, db = _choice("conv_weight_grad", outputs, inputs, grad.numel() // outputs, *operands)(*operands)
    return dx, dw, db


def known_batched(m: int, n: int, k: int) -> str | None:
    """Does what :func:`known` does for :func:`batched` of plain tensors."""
    return known("input_grad", m, k, n) if m * n * k > _LARGE else "torch"


def batched(a: Tensor, b: Tensor) -> Tensor:
    """Returns a b for a (B, M, N), b (B, N, K)."""
    (batch, m, n), k = a.shape, b.shape[2]
    large = batch and m * n * k > _LARGE and _dispatch.direct(a, b)
    product = _choice("input_grad", m, k, n, a[0], b[0]) if large else torch.matmul
    if product is torch.matmul:
        return torch.bmm(a, b)
    parts = [product(one, other) for one, other in zip(a, b, strict=True)]
    return parts[0][None] if batch == 1 else torch.stack(parts)
