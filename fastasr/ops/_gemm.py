# SPDX-License-Identifier: Apache-2.0
"""The matrix product around a kernel: torch's or one of fastasr's own, whichever was measured faster on this machine.

torch's float32 products go through MKL, which takes a slow path on some CPUs. fastasr's own product
(csrc/cpu/gemm/gemm.h) takes operands of any strides, reads long rows where they lie, packs the rest and writes results
to freed buffers. It is faster for large results and for the transposed operands of gradients. A third product, for
fewer than 16 rows as in a stream's chunk, reads each weight once, where it lies. The choice is measured, never guessed
from a vendor name: the first call of each shape class runs both on its own operands (a few calls' time), and the winner
is kept on disk by CPU, torch version and thread count. It must beat torch by 3 % to be taken. Load from other processes
may change which product is faster, or seems so: the file marks choices made under load, and a later process measures
them again. Only float32 on CPU has a choice; torch computes everything else.

Environment: ``FASTASR_GEMM=auto|torch|native``, ``FASTASR_CACHE=<folder>`` (default: the user's cache folder).
"""

import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr import files, processor
from fastasr._recording import is_traced
from fastasr.ops import _dispatch, _reduced_weights
from fastasr.ops._dispatch import why_not_cpu

_log = logging.getLogger("fastasr")
_MARGIN = 0.97
_MARGIN_UNDER_LOAD = 0.9
_REVISION = 10  # It rises with fastasr's product, measurement and file; choices of others are not read.
_PAIRS = 8  # At most this many pairs of rounds are timed, and after the first only while all take less than _SHORT_S.
_SHORT_S = 0.05  # A measurement under load may take twice as long.
_BUDGET_S = 0.5
_MOST_FEW = 15  # The product of few rows takes at most this many: cpu::kFewRows.
_FEW_COLUMNS = 14  # A tile of registers has this many rows with AVX-512.
SMALL = 1 << 17  # One row of 192 inputs and 512 outputs is below it.
_BIAS_LATER = 1 << 23  # kBiasLater of csrc/bindings/layer_products.cpp
_LARGE = 96 * SMALL  # torch multiplies a batch of smaller matrices at once, faster than fastasr one by one.
CHAINS = 12  # If a weight's gradient has fewer columns, torch adds it up in one chain of floats.
_CLEAR = 1.1  # Stop after two pairs if fastasr's product is this much slower.
_AGAIN_S = 60  # A choice made under load is measured again after this time, which doubles with each loaded measurement.
_DOUBLED = 11  # The time doubles at most this often, to a day and a half.
_AGAIN_BUDGET_S = 0.5  # A process spends at most this: a model has some hundred choices, of 20 ms each.

why_not = partial(why_not_cpu, "gemm")  # says why there is nothing to choose from; "" when there is


# --------------------------------------------------------------------------- the two products
def product(a: Tensor, b: Tensor, bias: Tensor | None = None, chain: int = 0) -> Tensor:
    """Returns a b + bias for matrices of any strides, in float32 or bfloat16, from fastasr's own product. Its sums run
    in chains of at most ``chain`` terms, or if it is 0 of as many as are fastest. In float32 a may be (maps, lines,
    rows, parts of a row, terms) of any strides but the last one's, which is 1."""
    return torch.ops.fastasr_cpu.gemm.default(a, b, bias, chain)


def add_product(c: Tensor, a: Tensor, b: Tensor, chain: int = 0) -> None:
    """Adds the same to c in float32, whose rows are contiguous. c may be (maps, lines, rows, columns)."""
    torch.ops.fastasr_cpu.gemm_add.default(c, a, b, chain)


def product_of_rows(a: Tensor, b: Tensor) -> Tensor:
    """Returns aᵀ b, summed over the rows of a (maps, lines, rows, M) and b (maps * lines * rows, N), in float32. The
    last stride of a is 1."""
    return torch.ops.fastasr_cpu.gemm_of_rows.default(a, b)


def memory(like: Tensor, *sizes: int) -> Tensor:
    """Returns uninitialised float32 of these sizes on the CPU, from memory that was freed, as fresh memory costs page
    faults."""
    n = math.prod(sizes)
    found: Tensor = torch.ops.fastasr_cpu.pooled_floats.default(like, n)
    return found.view(sizes)


def owned(view: Tensor) -> Tensor:
    """Returns the memory of a view as a tensor that is none: a node of autograd whose result is a view would not let
    others change it in place."""
    found = view.new_empty(0)
    return found.set_(view.untyped_storage(), view.storage_offset(), view.size(), view.stride())


# Operands have two or more dimensions: forward(x, w, b) = x wᵀ + b, input_grad(g, w) = g w, weight_grad(g, x) = gᵀ x
# with g (M, N), x (M, K).
def _native(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = a.reshape(-1, a.shape[-1])
    y = product(rows, b, None if bias is None else bias.contiguous())
    return y.view(*a.shape[:-1], b.shape[1])


def torchs(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Returns torch's x wᵀ + b. In float32 a large product takes as long with the bias behind it, and a native call of
    a whole layer adds the bias on its way: both give the same bits."""
    if b is None or x.numel() * len(w) < _BIAS_LATER or x.dtype is not torch.float32:
        return F.linear(x, w, b)
    return F.linear(x, w).add_(b)


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


def _conv_weight_grad(
    g: Tensor, x: Tensor, w: Tensor, stride: tuple, padding: tuple
) -> tuple[Tensor, Tensor]:
    _, dw, db = _conv_gradients(g, x, w, stride, padding, [False, True, True])
    return dw, db


def _planes(g: Tensor, x: Tensor, w: Tensor, stride: tuple, padding: tuple) -> tuple[Tensor, Tensor]:
    """Reorders maps whose channels are last: on AVX2 torch may then take less time, the copies included."""
    return _conv_weight_grad(g.contiguous(), x.contiguous(), w.contiguous(), stride, padding)


_PRODUCTS: dict[str, dict[str, Callable[..., Any]]] = {
    "torch": {
        "forward": torchs,
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
    "few rows": {"forward": _few_rows},  # "native" of fewer than 16 rows; it gives different bits
}


# --------------------------------------------------------------------------- what has been measured
@cache
def _machine(*facts: Path) -> str:
    """Returns a hash of the processor's name and features, from the file ``facts`` if one is given."""
    known = ("model name", "cpu family", "model", "flags", "CPU ", "Features")  # the last two: Arm
    fields = processor.fields(*facts)
    name = platform.processor() or platform.machine()
    name += "".join(f"{key}: {value}" for key, value in fields.items() if key.startswith(known))
    # FASTASR_SIMD may select a narrower set of kernels than the machine's widest.
    name += _dispatch.native_build_info().get("simd_set", "")
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def cache_file() -> Path:
    """Returns the path of the measured choices."""
    root = os.environ.get("FASTASR_CACHE")
    folder = (
        Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastasr"
    )
    version = torch.__version__.replace("+", "-")
    return folder / f"products{_REVISION}-{_machine()}-torch{version}.json"


@dataclass(frozen=True)
class _Choice:
    product: str
    under_load: bool
    times: int  # how often it has been measured
    at: float  # the time of the last measurement, in seconds since 1970

    def due(self) -> bool:
        """Says whether it is to be measured again, if the machine is idle."""
        wait = _AGAIN_S << min(self.times - 1, _DOUBLED)
        # If the time is negative, the clock was set back.
        return self.under_load and _again > 0 and not 0 <= time.time() - self.at < wait


_choices: dict[tuple, Callable[..., Any]] = {}
_forgotten = 0
_saved: dict[str, object] | None = None
_again = _AGAIN_BUDGET_S  # the seconds left


def _read(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _parsed(entry: Any, products: Collection[str] = _PRODUCTS) -> _Choice | None:
    """Returns the choice of one of ``products`` that an entry of the file holds, or None: the file may be damaged, or
    of a version of fastasr with other products.
    """
    try:
        choice = _Choice(**entry)
    except TypeError:
        return None
    whole = [*map(type, vars(choice).values())] == [str, bool, int, float]
    return choice if whole and choice.product in products and choice.times in range(1, 1 << 31) else None


def _remember(key: str, choice: _Choice, products: Collection[str] = _PRODUCTS) -> _Choice:
    """Writes a choice to the file. Returns the one that holds: a choice that another process made meanwhile on an
    idle machine replaces one made under load.
    """
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = _read(path)
        other = _parsed(content.get(key), products)
        if other is not None and choice.under_load > other.under_load:
            return other
        content[key] = asdict(choice)
        # Damaged entries are dropped. Each entry takes a line: json's own indentation takes ten times as long.
        whole = sorted(item for item in content.items() if _parsed(item[1]) is not None)
        lines = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in whole)
        files.write(path, "{\n" + ",\n".join(lines) + "\n}\n", durable=False)
    except OSError as error:
        _log.debug("measured GEMM choices are not kept on disk: %s", error)
    return choice


def kept() -> tuple[int, int]:
    """Counts the choices on disk, and among them the ones made under load."""
    found = [choice for entry in _read(cache_file()).values() if (choice := _parsed(entry)) is not None]
    return len(found), sum(choice.under_load for choice in found)


def forget() -> None:
    """Drops every remembered choice of this process: the next call of each shape class reads or measures again."""
    global _saved, _forgotten, _again
    _choices.clear()
    _dispatch.FAMILIES["linear"].chosen.clear()
    _saved, _again = None, _AGAIN_BUDGET_S
    _forgotten += 1


def generation() -> int:
    """Counts the calls of ``forget``: choices are valid while the number stays."""
    return _forgotten


def _decide(key: tuple, operands: tuple | None) -> str:
    """Returns the product for calls of this class, measured on the operands. Without operands it returns "" before the
    first measurement.
    """
    global _saved, _again
    policy = os.environ.get("FASTASR_GEMM", "auto")
    if policy not in ("auto", "torch", "native"):
        raise ValueError(f"FASTASR_GEMM: expected auto, torch or native, got {policy!r}")
    if policy == "torch" or why_not():
        return "torch"
    operation, m, *sizes, threads = key
    # The kernel takes 8 outputs or more, which all calls of a class of 16 have. For few rows "native" is no candidate:
    # MKL may add them in short sums, and the error of "native" was 2.4 times MKL's on an Intel processor.
    few = operation == "forward" and 1 << m <= _MOST_FEW + 1 and sizes[0] >= 16
    own = "few rows" if few and not why_not_cpu("linear_few_rows") else "native"
    if policy == "native":
        return own
    half_octaves = " ".join(str(round(2 * math.log2(size))) for size in sizes)
    name = f"{operation} {m} {half_octaves} {threads}"
    if _saved is None:
        _saved = _read(cache_file())
    products = ["torch", own]
    found = _parsed(_saved.get(name), products)
    if operands is None:
        return "" if found is None or found.due() else found.product
    if found is not None and found.due():
        _saved |= _read(cache_file())  # another process may have measured it meanwhile
        found = _parsed(_saved.get(name), products)
    if found is not None and not (found.due() and processor.crowd(threads) <= 1):
        return found.product
    began = time.perf_counter()
    product, under_load = _measure(operation, operands, own)
    if found is not None:
        _again = 0 if under_load else _again - (time.perf_counter() - began)
    times = 1 if found is None else found.times + 1
    choice = _remember(name, _Choice(product, under_load, times, time.time()), products)
    _saved[name] = asdict(choice)
    return choice.product


def _timed(product: str, operation: str, operands: tuple) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter  # a thread's own time
    begin = clock()
    _PRODUCTS[product][operation](*operands)
    return clock() - begin


def _measure(operation: str, operands: tuple, own: str) -> tuple[str, bool]:
    """Returns the product to take, torch's or ``own``, and whether others kept the machine busy meanwhile."""
    load = processor.Load(torch.get_num_threads())
    # The first run packs and allocates. It is all that torch's product gets if it takes longer than the budget.
    first = [_timed(product, operation, operands) for product in ("torch", own)]
    load.look()
    theirs: list[float] = []
    ours: list[float] = []
    for pair in range(_PAIRS):
        spent, busy = load.seconds, load.is_high(theirs, ours)
        # one call may have waited for another process: a short product is measured often
        enough = pair > 0 and spent > (1 + busy) * _SHORT_S
        if enough or spent > _BUDGET_S or (pair > 1 and min(ours) > _CLEAR * min(theirs)):
            break
        # in either order: clocks and caches that warm up serve whichever product comes later
        for product in ("torch", own, own, "torch"):
            (theirs if product == "torch" else ours).append(_timed(product, operation, operands))
            load.look()
    if once := not theirs:
        # torch writes every large result to fresh memory, whose page faults take time; fastasr does so only at first.
        theirs, ours = first[:1], [_timed(own, operation, operands)]
        load.look()
    busy = load.is_high(theirs, ours)
    margin = _MARGIN_UNDER_LOAD if busy or once else _MARGIN
    # Other processes disturb the shortest times least. The median of rounds shows if only one was lucky.
    wins = min(ours) < margin * min(theirs)
    wins = wins and processor.median([b - a for a, b in zip(theirs, ours, strict=True)]) < 0
    return own if wins else "torch", busy


@overload
def _chosen(key: tuple, operands: tuple) -> Callable[..., Any]: ...


@overload
def _chosen(key: tuple, operands: tuple | None) -> Callable[..., Any] | None: ...


def _chosen(key: tuple, operands: tuple | None) -> Callable[..., Any] | None:
    """Returns the product of this class, chosen now if there are operands. None before the choice."""
    f = _choices.get(key)
    if f is None and (name := _decide(key, operands)):
        f = _choices[key] = _PRODUCTS[name][key[0]]
    return f


def _choice(operation: str, m: int, n: int, k: int, *operands: Any) -> Callable[..., Any]:
    x = operands[0]
    # Deterministic algorithms need the same choice on every machine and in every run. FakeTensorMode knows torch's
    # product alone.
    fixed = torch.are_deterministic_algorithms_enabled() or is_traced()
    if x.dtype is not torch.float32 or not x.is_cpu or fixed:
        return _PRODUCTS["torch"][operation]
    return _chosen((operation, m.bit_length(), n, k, torch.get_num_threads()), operands)


def register_product(operation: str, **products: Callable[..., Any]) -> None:
    """Adds an operation, ``torch`` and ``native``, among which ``is_torch`` chooses."""
    for name, product in products.items():
        _PRODUCTS[name][operation] = product


def may_choose(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Says whether products other than torch's may compute a layer's call on these operands."""
    return (
        x.is_cpu
        and x.dtype is weight.dtype is torch.float32
        and _dispatch.direct(x, weight, bias)
        and _dispatch.forced_backend() != "eager"
        and not is_traced()
        and not torch.is_autocast_enabled("cpu")
        and not torch.are_deterministic_algorithms_enabled()
        and not why_not()
        and x.numel() > 0
    )


def is_torch(key: tuple, *operands: Any) -> bool | None:
    """Says whether torch's product serves calls of this operation, sizes and threads. None before the choice, which is
    made now if there are operands.
    """
    f = _chosen(key, operands or None)
    return None if f is None else f is _PRODUCTS["torch"][key[0]]


def beats_torch(key: tuple, *operands: Any) -> bool:
    """Says whether fastasr's product serves such calls of a layer, chosen now if it has not been."""
    with torch.no_grad():
        return not is_torch(key, *operands)


def chosen_product(operation: str, m: int, n: int, k: int) -> str | None:
    """Returns the name of the product that serves such a call in float32 on the CPU, None before one has been chosen.
    ``forward`` has m rows, n outputs and k inputs; ``input_grad`` multiplies (m, k) by (k, n).
    """
    if m * n * k < SMALL or torch.are_deterministic_algorithms_enabled():
        return "torch"
    f = _choices.get((operation, m.bit_length(), n, k, torch.get_num_threads()))
    if f is None:
        return None
    return next(name for name, products in _PRODUCTS.items() if products.get(operation) is f)


def leaves_bias(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Says whether ``forward`` adds the bias in a pass of its own, which a kernel that comes next may save."""
    if bias is None or x.numel() * len(weight) < _BIAS_LATER or not x.is_cpu or x.dtype is not torch.float32:
        return False
    if _reduced_weights.copies and _reduced_weights.of(x, weight) is not None:
        return False
    return chosen_product("forward", x.shape[:-1].numel(), *weight.shape) == "torch"


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
    if k <= _FEW_COLUMNS < n:  # Few columns fill more of a tile of registers as rows.
        return weight_grad(x, grad).t().contiguous()
    if grad.numel() * k < SMALL:
        return _weight_grad(grad, x)
    return _choice("weight_grad", n, k, rows, grad, x)(grad, x)


def add_weight_grad(c: Tensor, grad: Tensor, x: Tensor) -> None:
    """Adds gradᵀ x to c, whose rows are contiguous, for grad (M, N), x (M, K)."""
    (rows, n), k = grad.shape, x.shape[1]
    native = _PRODUCTS["native"]["weight_grad"]
    if rows * n * k >= SMALL and _choice("weight_grad", n, k, rows, grad, x) is native:
        add_product(c, grad.t(), x)
    else:
        c.addmm_(grad.t(), x)


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
    """Does what :func:`chosen_product` does for :func:`batched` of plain tensors."""
    return chosen_product("input_grad", m, k, n) if m * n * k > _LARGE else "torch"


def batched(a: Tensor, b: Tensor) -> Tensor:
    """Returns a b for a (B, M, N), b (B, N, K)."""
    (batch, m, n), k = a.shape, b.shape[2]
    large = batch and m * n * k > _LARGE and _dispatch.direct(a, b)
    product = _choice("input_grad", m, k, n, a[0], b[0]) if large else torch.matmul
    if product is torch.matmul:
        return torch.bmm(a, b)
    parts = [product(one, other) for one, other in zip(a, b, strict=True)]
    return parts[0][None] if batch == 1 else torch.stack(parts)
