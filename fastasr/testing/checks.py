# SPDX-License-Identifier: Apache-2.0
"""The checks that every op passes, each driven by the op's sample table alone.

A check is a function ``(table, sample, dtype, device)`` that raises ``AssertionError``; ``CHECKS`` lists them with the
samples and dtypes they apply to. The test suite parametrises over the same list that ``fastasr check`` runs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from fastasr import ops
from fastasr.ops import _dispatch
from fastasr.testing.declared import declared
from fastasr.testing.refusals import Refusal, refusals
from fastasr.testing.seeds import seed_torch, seeded
from fastasr.testing.table import Make, OpTable, Sample, flat, floating, is_gradient, table, with_tensors
from fastasr.testing.tolerance import Comparison, compare, judged
from fastasr.testing.transforms import transforms

ENTRIES = 200


def _make(sample: Sample, dtype: torch.dtype, device: str, seed: int = 0) -> dict:
    return sample.arguments(Make(dtype, device, seed))


def _maker(sample: Sample, device: str) -> Callable[[torch.dtype, int], dict]:
    """Returns a function of the dtype and the draw."""
    return lambda dtype, draw: _make(sample, dtype, device, draw)


def _call(f: Callable[..., Tensor], arguments: dict) -> Tensor:
    seed_torch(seeded("call"))  # an op that draws (dropout) draws the same numbers in every call
    return flat(f(**arguments))


Layout = Callable[[str, Tensor], Tensor]  # (name of an argument or "cotangent", value) -> the value laid out


def _contiguous(name: str, t: Tensor) -> Tensor:
    return t.clone()


def _leaves(table: OpTable, arguments: dict) -> dict:
    """Returns the call with tensors that require gradients, unless the op is a gradient itself."""
    return with_tensors(arguments, lambda _, t: t.requires_grad_(not is_gradient(table.function)))


def values_and_gradients(
    f: Callable[..., Tensor],
    arguments: dict,
    cotangent: Tensor | None = None,
    draw: int = 0,
    layout: Layout = _contiguous,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Returns f's output, its gradients by argument, and the cotangent that they belong to. An op that is a gradient
    itself has no gradients.
    """
    wanted = not is_gradient(f)
    leaves = with_tensors(arguments, lambda name, t: layout(name, t.detach()).requires_grad_(wanted))
    out = _call(f, leaves)
    if cotangent is None:
        cotangent = Make(out.dtype, out.device.type, f"cotangent {draw}").normal(*out.shape)
    names = list(floating(leaves)) if out.requires_grad else []
    if not names:
        return out, {}, cotangent
    laid_out = layout("cotangent", cotangent.to(out.dtype))
    grads = torch.autograd.grad(out, [leaves[n] for n in names], laid_out, allow_unused=True)
    return out, dict(zip(names, grads, strict=True)), cotangent


def _same(a: Tensor, b: Tensor, what: str) -> None:
    if a.dtype != b.dtype:
        raise AssertionError(f"{what}: dtype {a.dtype}, expected {b.dtype}")
    if not torch.equal(a.nan_to_num(7.0, 8.0, 9.0), b.nan_to_num(7.0, 8.0, 9.0)) or not torch.equal(
        a.isnan(), b.isnan()
    ):
        worst = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
        raise AssertionError(f"{what}: not bitwise equal, largest difference {worst:.3e}")


def _close(a: Tensor, b: Tensor, what: str) -> None:
    eps = torch.finfo(a.dtype).eps
    torch.testing.assert_close(
        a, b, rtol=16 * eps, atol=16 * eps, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def _all_agree(agree: Callable, found: tuple, expected: tuple, note: str = "") -> None:
    """Asserts that values and gradients of two calls of ``values_and_gradients`` agree."""
    agree(found[0].detach(), expected[0].detach(), f"values{note}")
    for name, grad in found[1].items():
        agree(grad, expected[1][name], f"gradient of {name}{note}")


# --------------------------------------------------------------------------- numerics
def parity(table: OpTable, sample: Sample, dtype: torch.dtype, device: str) -> None:
    """Compares values and gradients with the float64 definition; the error must not exceed eager's."""
    as_near_as_eager(table, _maker(sample, device), dtype, sample.draws, sample.exact)


def as_near_as_eager(
    table: OpTable,
    arguments: Callable[[torch.dtype, int], dict],
    dtype: torch.dtype = torch.float32,
    draws: int = 1,
    exact: bool = True,
) -> None:
    """Asserts that values, and gradients if ``exact``, of the calls ``arguments(dtype, draw)`` are as near to float64
    as eager's.
    """

    def one_draw(draw: int, single: bool) -> Iterator[tuple[str, Comparison]]:
        kind = torch.float32 if single else dtype
        return compared(table, arguments(kind, draw), kind, draw, exact)

    _assert_judged(one_draw, draws)


def _assert_judged(one_draw: Callable, draws: int) -> None:
    failed = judged(one_draw, draws)
    assert not failed, "; ".join(f"{name}: {comparison}" for name, comparison in failed.items())


def compared(
    table: OpTable,
    arguments: dict,
    dtype: torch.dtype,
    draw: int = 0,
    exact: bool = True,
    oracle: torch.dtype = torch.float64,
    cotangent: Tensor | None = None,
    layout: Layout = _contiguous,
) -> Iterator[tuple[str, Comparison]]:
    """Yields each comparison with eager and the oracle: of the values and, if ``exact``, of each gradient. The op's
    own arguments and cotangent have this ``layout``; those of eager and the oracle are contiguous."""
    wide = with_tensors(arguments, lambda _, t: t.to(oracle))
    if not exact:
        with torch.no_grad():
            out, eager, reference = (
                _call(f, a)
                for f, a in (
                    (table.function, arguments),
                    (table.definition, arguments),
                    (table.definition, wide),
                )
            )
        yield "values", compare(out, eager, reference)
        return
    eager, eager_grads, cotangent = values_and_gradients(table.definition, arguments, cotangent, draw)
    out, grads, _ = values_and_gradients(table.function, arguments, cotangent, layout=layout)
    with _drawing_like(dtype):
        reference, reference_grads, _ = values_and_gradients(table.definition, wide, cotangent)
    assert out.dtype == eager.dtype, f"dtype {out.dtype}, eager gives {eager.dtype}"
    assert grads.keys() == eager_grads.keys()
    yield "values", compare(out, eager, reference)
    for name, grad in grads.items():
        assert grad is not None, f"no gradient for {name}"
        assert grad.dtype == arguments[name].dtype, f"gradient of {name} has dtype {grad.dtype}"
        yield f"gradient of {name}", compare(grad, eager_grads[name], reference_grads[name])


@contextmanager
def _drawing_like(dtype: torch.dtype) -> Iterator[None]:
    """Inside this context, ``torch.rand`` draws in ``dtype`` and widens, so that the float64 reference has the same
    dropout mask."""
    original = torch.rand

    def rand(
        *shape: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        _draw: torch.dtype = dtype,
    ) -> Tensor:
        return original(*shape, device=device, dtype=_draw).to(dtype)

    torch.rand = rand  # type: ignore[assignment]  # it takes fewer arguments
    try:
        yield
    finally:
        torch.rand = original


def no_grad_equals_grad(table: OpTable, sample: Sample, dtype: torch.dtype, device: str) -> None:
    """Inference mode, no_grad and grad mode give the same values, and so does the registered op."""
    arguments = _make(sample, dtype, device)
    out = _call(table.function, with_tensors(arguments, lambda _, t: t.clone().requires_grad_()))
    with torch.no_grad():
        _same(_call(table.function, arguments), out.detach(), "no_grad")
    with torch.inference_mode():
        _same(_call(table.function, arguments).clone(), out.detach(), "inference_mode")
    seed_torch(seeded("call"))
    _same(table.call_registered(arguments), out.detach(), "registered op")


def gradcheck(table: OpTable, sample: Sample, dtype: torch.dtype, device: str) -> None:
    """Compares analytic with numerical gradients in float64, through the public function and the registered op.

    With more than ``ENTRIES`` numbers it checks random directions, because checking each entry takes two calls.
    """
    arguments = with_tensors(_make(sample, torch.float64, device), lambda _, t: t.requires_grad_())
    names = list(floating(arguments))

    def public(*tensors: Tensor) -> Tensor:
        return without_constants(table.function(**call(*tensors)))

    def registered(*tensors: Tensor) -> Tensor:
        a = call(*tensors)
        return without_constants(table.result(a, table.overload(*table.registered(a))))

    def call(*tensors: Tensor) -> dict:
        seed_torch(seeded("call"))
        return arguments | dict(zip(names, tensors, strict=True))

    def without_constants(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
        return flat(outputs if isinstance(outputs, Tensor) else outputs[:graded])

    op = ops.OPS.get(table.op)
    graded = len(declared(op).graded) if op else None

    tensors = tuple(arguments[n] for n in names)
    fast = sum(t.numel() for t in tensors) > ENTRIES
    assert torch.autograd.gradcheck(public, tensors, nondet_tol=0.0, fast_mode=fast)
    assert torch.autograd.gradcheck(registered, tensors, nondet_tol=0.0, fast_mode=fast)


def double_backward(table: OpTable, sample: Sample, dtype: torch.dtype, device: str) -> None:
    """Gradients of gradients raise an error that names the eager backend; under that backend they work."""
    arguments = with_tensors(_make(sample, torch.float64, device), lambda _, t: t.requires_grad_())
    leaves = list(floating(arguments).values())

    def twice(out: Tensor) -> None:
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), leaves)

    def registered() -> Tensor:
        return table.call_registered(arguments)

    for run in (lambda: _call(table.function, arguments), registered):
        if _dispatch.explain_choice(_family(table), device, torch.float64)[0] == "eager":
            continue
        try:
            twice(run())
        except RuntimeError as error:
            if "eager" not in str(error):
                raise AssertionError(f"the error does not say what to do: {error}") from error
        else:
            raise AssertionError("a second derivative was returned")
    with _dispatch.backend("eager"):
        twice(_call(table.function, arguments))


def _family(table: OpTable) -> str:
    return next(f.name for f in _dispatch.FAMILIES.values() if table.op in f.ops)


# --------------------------------------------------------------------------- layout and memory
def _transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t


def _sliced(t: Tensor) -> Tensor:
    if t.dim() == 0:
        return t
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), float("nan"), dtype=t.dtype, device=t.device)
    view = wide[..., 1::2]
    view.copy_(t)
    return view


def _rows_of_wider_ones(name: str, t: Tensor) -> Tensor:
    # Rows of different arguments lie apart by different strides.
    if t.dim() == 0:
        return t
    wide = (*t.shape[:-1], t.shape[-1] + 1 + sum(name.encode()) % 11)
    return torch.full(wide, float("nan"), dtype=t.dtype, device=t.device)[..., : t.shape[-1]].copy_(t)


def _offset(t: Tensor) -> Tensor:
    # The data begins one element after an aligned address, because vector loads must not assume alignment.
    buffer = torch.full((t.numel() + 1,), float("nan"), dtype=t.dtype, device=t.device)
    view = buffer[1:].view(t.shape)
    view.copy_(t)
    return view


def _reversed_order(t: Tensor) -> Tensor:
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def _agree(
    table: OpTable,
    arguments: Callable[[torch.dtype, int], dict],
    dtype: torch.dtype,
    draws: int,
    layouts: dict[str, Layout],
    cotangent: Callable[[torch.dtype, int], Tensor | None] = lambda dtype, draw: None,
) -> None:
    """Asserts that a call gives the same results in each of the layouts as with contiguous tensors.

    Sums in another order differ by more than ``_close`` allows where their terms cancel. Then the results of all these
    calls must be as near to float64 as eager's, by the contract's tolerance.
    """

    def one_draw(draw: int, single: bool) -> Iterator[tuple[str, Comparison]]:
        kind = torch.float32 if single else dtype
        for name, layout in {"contiguous": _contiguous, **layouts}.items():
            given, weights = arguments(kind, draw), cotangent(kind, draw)
            for what, comparison in compared(table, given, kind, draw, cotangent=weights, layout=layout):
                yield f"{name}, {what}", comparison

    given = arguments(dtype, 0)
    first = values_and_gradients(table.function, given, cotangent(dtype, 0))
    try:
        for name, layout in layouts.items():
            other = values_and_gradients(table.function, given, first[2], layout=layout)
            _all_agree(_close, other, first, f", {name}")
    except AssertionError:
        _assert_judged(one_draw, draws)


def _of_tensor(f: Callable[[Tensor], Tensor], name: str, t: Tensor) -> Tensor:
    return f(t)


def strides(table: OpTable, sample: Sample, dtype: torch.dtype, device: str) -> None:
    """Transposed, sliced, reordered and unaligned arguments and gradients give the same results as contiguous ones."""
    layouts = (_transposed, _sliced, _offset, _reversed_order)
    changes: dict[str, Layout] = {f.__name__: partial(_of_tensor, f) for f in layouts}
    _agree(
        table,
        _maker(sample, device),
        dtype,
        sample.draws,
        changes | {"rows of wider ones": _rows_of_wider_ones},
    )


def expanded(table: OpTable, sample: Sample, dtype: torch.dtype, device: str) -> None:
    """One row expanded to many works, and so do expanded gradients, whose strides are 0 in all dimensions, as after
    ``.sum()``, or in all but the last.
    """
    make = _maker(sample, device)

    def one_row(name: str, t: Tensor) -> Tensor:
        return t[:1].expand_as(t) if name in table.rows and t.dim() > 1 else t

    def rows_alike(dtype: torch.dtype, draw: int) -> dict:
        return with_tensors(make(dtype, draw), lambda name, t: one_row(name, t).contiguous())

    _agree(table, rows_alike, dtype, sample.draws, {"expanded arguments": one_row})
    shape = _call(table.function, make(dtype, 0)).shape
    for sizes in ((), shape[-1:]):

        def alike(dtype: torch.dtype, draw: int, sizes: tuple[int, ...] = sizes) -> Tensor:
            return Make(dtype, device, f"cotangent {draw}").normal(*sizes).expand(shape).contiguous()

        def one_value(name: str, t: Tensor, sizes: tuple[int, ...] = sizes) -> Tensor:
            return t[(0,) * (t.dim() - len(sizes))].expand_as(t) if name == "cotangent" else t

        _agree(table, make, dtype, sample.draws, {"expanded gradient": one_value}, alike)


def poisoned(table: OpTable, sample: Sample, dtype: torch.dtype, device: str) -> None:
    """If every new allocation is filled with NaN, results stay the same: no memory is read before it is written."""
    arguments = _make(sample, dtype, device)
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        settings.fill_uninitialized_memory = False
        first = values_and_gradients(table.function, arguments)
        settings.fill_uninitialized_memory = True
        again = values_and_gradients(table.function, arguments, first[2])
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]
    _all_agree(_same, again, first)


def inputs_untouched(table: OpTable, sample: Sample, dtype: torch.dtype, device: str) -> None:
    """The op writes to no argument and to no gradient."""
    arguments = _make(sample, dtype, device)
    copies = with_tensors(arguments, lambda _, t: t.clone())
    leaves = _leaves(table, arguments)
    out = _call(table.function, leaves)
    cotangent = Make(out.dtype, device, "cotangent").normal(*out.shape)
    copy = cotangent.clone()
    if not is_gradient(table.function):
        torch.autograd.grad(out, list(floating(leaves).values()), cotangent)
    for name, t in floating(copies).items():
        _same(arguments[name].detach(), t, name)
    _same(cotangent, copy, "gradient")


def changed_in_place(table: OpTable, sample: Sample, dtype: torch.dtype, device: str) -> None:
    """A caller may change the results in place, also where they have gradients; no argument changes with them."""
    arguments = _leaves(table, _make(sample, dtype, device))
    copies = with_tensors(arguments, lambda _, t: t.detach().clone())
    results = table.function(**arguments)
    for result in results if isinstance(results, tuple) else (results,):
        if result is not None:
            result.zero_()
    for name, t in copies.items():
        if isinstance(t, Tensor):
            _same(arguments[name].detach(), t, f"argument {name}")


def deterministic(table: OpTable, sample: Sample, dtype: torch.dtype, device: str) -> None:
    """Two runs are bitwise equal, and so are runs on one thread and on several."""
    arguments = _make(sample, dtype, device)
    first = values_and_gradients(table.function, arguments)
    threads = torch.get_num_threads()
    several = [2] * (3 if sample.large else 1)  # a race shows in some of the runs
    for n in (threads, 1, *several) if table.thread_invariant and device == "cpu" else (threads,):
        torch.set_num_threads(n)
        try:
            again = values_and_gradients(table.function, arguments, first[2])
        finally:
            torch.set_num_threads(threads)
        _all_agree(_same, again, first, f", {n} threads")


def chunked(table: OpTable, sample: Sample, dtype: torch.dtype, device: str) -> None:
    """Rows that are cut anywhere and computed separately give the same results as together, so padding cannot leak."""
    arguments = _make(sample, dtype, device)
    draws = arguments.get("training") or "dropout_seed" in arguments  # by the number of the row
    if not table.rows or arguments[table.rows[0]].dim() < 2 or draws:
        return
    length = arguments[table.rows[0]].shape[0]
    with torch.no_grad():
        whole = _call(table.function, arguments)
        for cut in {1, length // 2, length - 1}:
            if not 0 < cut < length:
                continue
            parts = []
            for piece in (slice(0, cut), slice(cut, length)):
                parts.append(
                    _call(
                        table.function,
                        arguments | {n: arguments[n][piece] for n in table.rows if n in arguments},
                    )
                )
            _close(torch.cat(parts), whole, f"cut at {cut}")


def rows_apart(table: OpTable, sample: Sample, dtype: torch.dtype, device: str) -> None:
    """A NaN in one row reaches neither the values nor the gradients of the other rows."""
    arguments = _make(sample, dtype, device)
    rows = [name for name in table.rows if name in floating(arguments)]
    if not rows or arguments[rows[0]].dim() < 2 or arguments[rows[0]].shape[0] < 2:
        return
    out, grads, cotangent = values_and_gradients(table.function, arguments)
    bad = arguments[rows[0]].shape[0] // 2
    for name in rows:
        arguments[name] = arguments[name].clone()
        arguments[name][bad] = float("nan")
    other, other_grads, _ = values_and_gradients(table.function, arguments, cotangent)
    good = torch.arange(out.shape[0], device=device) != bad
    _close(other[good].detach(), out[good].detach(), "values")
    for name in rows:
        _close(other_grads[name][good], grads[name][good], f"gradient of {name}")


# --------------------------------------------------------------------------- integration
def opcheck(table: OpTable, sample: Sample, dtype: torch.dtype, device: str) -> None:
    """Runs ``torch.library.opcheck``: schema, fake, autograd registration, AOT dispatch with dynamic shapes.

    The last takes four fifths of the time. If the op has gradients, it runs only with them: of a call without, it
    traces nothing but the fake function, which the second compares with the op.
    """
    arguments = _make(sample, dtype, device)
    plain = table.registered(arguments)
    if is_gradient(table.function):
        torch.library.opcheck(table.overload, plain)
        return
    torch.library.opcheck(table.overload, plain, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(table.overload, table.registered(_leaves(table, arguments)))


def compiles(table: OpTable, sample: Sample, dtype: torch.dtype, device: str) -> None:
    """``torch.compile(fullgraph=True)`` makes one graph with the same values and gradients."""
    arguments = _make(sample, dtype, device)
    torch._dynamo.reset()

    def caller(
        **a: Any,
    ) -> Any:  # torch guards on an op's names if it is traced inside another function, as in a model
        return table.function(**a)

    compiled = torch.compile(caller, fullgraph=True, backend="aot_eager")

    @wraps(table.function)
    def run(**a: Any) -> Any:
        return compiled(**a)

    first = values_and_gradients(table.function, arguments)
    _all_agree(_close, values_and_gradients(run, arguments, first[2]), first)


def no_recompile(table: OpTable, sample: Sample, dtype: torch.dtype, device: str) -> None:
    """One graph serves every length of dimension 0, so ragged lengths do not recompile."""
    arguments = _make(sample, dtype, device)
    if not table.rows or arguments[table.rows[0]].dim() < 2:
        return
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import and only used here

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(table.function, fullgraph=True, backend=counter, dynamic=True)
    graphs = []
    with torch.no_grad():
        for n in (43, 41, 37):  # no other size equals these, because torch gives equal sizes one symbol
            rows = [name for name in table.rows if name in arguments]
            short = arguments | {name: torch.cat([arguments[name]] * n)[:n] for name in rows}
            _close(_call(compiled, short), _call(table.function, short), f"length {n}")
            graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1], f"graphs compiled after each of three lengths: {graphs}"


def autocast(table: OpTable, sample: Sample, dtype: torch.dtype, device: str) -> None:
    """Under autocast, outputs have eager's dtype and accuracy, and gradients have the arguments' own dtypes."""

    def under(f: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(f)
        def run(**a: Any) -> Any:
            with torch.autocast(device, torch.bfloat16):
                return f(**a)

        return run

    @wraps(table.function)
    def overload(**a: Any) -> Tensor:
        return table.call_registered(a)

    def one_draw(draw: int, single: bool) -> Iterator[tuple[str, Comparison]]:
        arguments = _make(sample, torch.float32, device, draw)
        eager, eager_grads, cotangent = values_and_gradients(under(table.definition), arguments, draw=draw)
        wide = with_tensors(arguments, lambda _, t: t.double())
        reference, reference_grads, _ = values_and_gradients(table.definition, wide, cotangent.double())
        for name, f in (("function", table.function), ("registered op", overload)):
            if name == "registered op" and arguments.get("training"):
                continue
            out, grads, _ = values_and_gradients(under(f), arguments, cotangent)
            assert out.dtype == eager.dtype, f"{name}: dtype {out.dtype}, eager gives {eager.dtype}"
            yield f"{name}: values", compare(out, eager, reference)
            for argument, grad in grads.items():
                assert grad.dtype == torch.float32, f"{name}: gradient of {argument} has dtype {grad.dtype}"
                ours, theirs = grad.bfloat16(), eager_grads[argument].bfloat16()
                yield f"{name}: gradient of {argument}", compare(ours, theirs, reference_grads[argument])

    _assert_judged(one_draw, sample.draws)


def forced_eager(table: OpTable, sample: Sample, dtype: torch.dtype, device: str) -> None:
    """``backend("eager")`` runs the definition, bitwise."""
    arguments = _make(sample, dtype, device)
    with _dispatch.backend("eager"):
        out = _call(table.function, arguments)
    _same(out, _call(table.definition, arguments), "values")


# --------------------------------------------------------------------------- errors
def sizes(table: OpTable, sample: Sample, dtype: torch.dtype, device: str) -> None:
    """The op refuses each size that the formula cannot take: a kernel would read beyond its tensors."""
    arguments = _make(sample, dtype, device)
    for name, t in arguments.items():
        for dim, size in enumerate(t.shape if isinstance(t, Tensor) else ()):
            for other in (size + 1, size - 1):
                if size and other:
                    rows = torch.arange(other, device=device, dtype=torch.int64) % size
                    changed = arguments | {name: t.index_select(dim, rows)}
                    taken = _takes(table.definition, changed, Exception)
                    refused = not _takes(table.function, changed, ValueError)
                    assert taken or refused, f"{name}: {other} in dimension {dim} is not refused"


def _takes(function: Callable, arguments: dict, error: type[Exception]) -> bool:
    try:
        function(**arguments)
    except error:
        return False
    return True


def refuses(table: OpTable, device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yields (name, check) for every call that must raise: calls of the table, and calls made from its samples."""

    def expect(arguments: dict, error: type[Exception] | tuple, match: str) -> None:
        try:
            table.function(**arguments)
        except error as raised:
            message = str(raised)
            assert message.startswith(f"fastasr.{table.op}: "), f"the message does not name the op: {message}"
            assert match in message, f"{match!r} is not in the message: {message}"
            assert "expected" in message, f"what was expected is not in the message: {message}"
            assert "got" in message, f"what came is not in the message: {message}"
        except Exception as raised:
            raise AssertionError(f"raised {type(raised).__name__}: {raised}") from raised
        else:
            raise AssertionError("nothing was raised")

    for invalid in table.invalid:
        arguments = invalid.arguments(Make(torch.float32, device))
        yield invalid.name, partial(expect, arguments, invalid.error, invalid.match)
    for sample in table.thorough:
        for refusal in refusals(table.op, _make(sample, torch.float32, device)):
            match = f"fastasr.{table.op}: {refusal.blamed}: "
            yield f"{sample.name}: {refusal.name}", partial(_refused, expect, refusal, match)


def _refused(expect: Callable[..., None], refusal: Refusal, match: str) -> None:
    expect(refusal.arguments(), refusal.error, match)


# --------------------------------------------------------------------------- the list
NARROW = (torch.bfloat16, torch.float16)
WIDE = (torch.float32, *NARROW, torch.float64)
ALL, THOROUGH, RICHEST, NONE = "all", "thorough", "richest", "none"


@dataclass(frozen=True)
class Check:
    """A check and the cases it applies to. ``differentiates``: it needs an op that has gradients. ``short``: the
    samples that the short tests leave it where a backend is forced, because kernels on an interpreter or an emulator
    take seconds a call. ``forced``: whether the check makes sense there at all."""

    run: Callable[[OpTable, Sample, torch.dtype, str], None]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    thorough_only: bool = False
    forced: bool = True
    differentiates: bool = False
    short: str = ALL

    @property
    def name(self) -> str:
        return self.run.__name__

    def samples(self, table: OpTable) -> tuple[Sample, ...]:
        if self.differentiates and is_gradient(table.function):
            return ()
        chosen = table.thorough if self.thorough_only else table.samples
        return chosen if self.run is parity else tuple(s for s in chosen if s.exact)

    def is_short(self, table: OpTable, sample: Sample) -> bool:
        return {
            ALL: True,
            THOROUGH: sample.thorough,
            RICHEST: sample.name == table.richest.name,
            NONE: False,
        }[self.short]


# ``poisoned`` compares two runs bit by bit, as ``deterministic`` does.
CHECKS = (
    Check(parity, WIDE),
    Check(no_grad_equals_grad, short=RICHEST),
    Check(gradcheck, (torch.float64,), thorough_only=True, forced=False, differentiates=True),
    Check(double_backward, (torch.float64,), thorough_only=True, forced=False, differentiates=True),
    Check(strides, (torch.float32, torch.bfloat16), thorough_only=True, short=RICHEST),
    Check(expanded, thorough_only=True, short=RICHEST),
    Check(poisoned, thorough_only=True, short=RICHEST),
    Check(inputs_untouched, thorough_only=True, short=RICHEST),
    Check(changed_in_place, thorough_only=True, forced=False),
    Check(deterministic, short=NONE),
    Check(chunked, short=RICHEST),
    Check(rows_apart, thorough_only=True, short=RICHEST),
    Check(opcheck, thorough_only=True, forced=False),
    Check(compiles, thorough_only=True, forced=False),
    Check(no_recompile, thorough_only=True, forced=False),
    Check(autocast, thorough_only=True, forced=False),
    Check(forced_eager, WIDE, thorough_only=True, forced=False),
    Check(sizes, thorough_only=True, forced=False),
    Check(transforms, (torch.float32, torch.float64), thorough_only=True, forced=False, differentiates=True),
)


@dataclass(frozen=True)
class Case:
    """One check of an op on one sample. ``long``: the short tests leave it out."""

    table: OpTable
    check: Check
    sample: Sample
    dtype: torch.dtype
    device: str
    long: bool = False

    def __call__(self) -> None:
        self.check.run(self.table, self.sample, self.dtype, self.device)

    @property
    def id(self) -> str:
        """Returns the case's name as pytest shows it."""
        dtype = str(self.dtype).removeprefix("torch.")
        parts = self.table.op, self.check.name, self.sample.name, dtype, self.device
        return "-".join(parts).replace(" ", "_")


def cases(table: OpTable, device: str, *, forced: bool = False) -> Iterator[Case]:
    """Yields the cases of one op.

    ``forced``: kernels are interpreted or emulated, on small samples, in one draw first, without float64. The short
    tests compare thorough samples with float64 in one of the two 16-bit types too, by sample and the run's seed.
    """
    for check in CHECKS:
        if forced and not check.forced:
            continue
        for sample in check.samples(table):
            if not forced:
                yield from (Case(table, check, sample, dtype, device) for dtype in check.dtypes)
            elif not sample.large:
                one = NARROW[seeded(table.op, sample.name) % 2]
                waits = (one,) if sample.thorough and check.run is parity else NARROW
                one_draw, short = replace(sample, draws=1), check.is_short(table, sample)
                for dtype in check.dtypes:
                    if dtype is not torch.float64:
                        yield Case(table, check, one_draw, dtype, device, dtype in waits or not short)


@dataclass(frozen=True)
class CheckResult:
    op: str
    check: str
    sample: str
    dtype: str
    passed: bool
    message: str


def check_op(
    name: str, *, device: str = "cpu", progress: Callable[[int, int, str], None] | None = None
) -> list[CheckResult]:
    """Runs every check of one op on this machine and calls ``progress(done, total, label)`` before each."""
    of_op = table(name)
    work: list[tuple[str, str, str, Callable[[], None]]] = [
        (case.check.name, case.sample.name, str(case.dtype).removeprefix("torch."), case)
        for case in cases(of_op, device)
    ]
    work += [("refuses", label, "-", run) for label, run in refuses(of_op, device)]
    results = []
    for i, (check, sample, dtype, run) in enumerate(work):
        if progress is not None:
            progress(i, len(work), f"{name}: {check} {sample} {dtype}")
        message = ""
        try:
            run()
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        results.append(CheckResult(name, check, sample, dtype, not message, message))
    return results
