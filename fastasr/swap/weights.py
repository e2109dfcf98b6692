# SPDX-License-Identifier: Apache-2.0
"""Chooses the weights of a swapped model whose products run in fewer bits, measures the error, and undoes it.

:func:`keep` makes a copy of every weight of a linear layer or a pointwise convolution whose product runs through
fastasr's ops (:mod:`fastasr.ops._reduced_weights`); the parameters stay. With inputs it measures the error of each
product on the activations that it meets, and of the model's outputs, both as the rms of the difference from float32
relative to the rms of the result. A product whose error stands out stays in float32, and so do the next ones, largest
error first, until the outputs are within the bound.

A transducer's predictor and joint network stay in float32: their results are compared with each other, token against
token, so they change more texts than the whole encoder does, and greedy search has a copy of them in a native call.
"""

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from fastasr.models.transducer.predictors import find_predictor
from fastasr.ops import _reduced_weights
from fastasr.swap import binding
from fastasr.swap.state import ModelState
from fastasr.swap.verify import run

FLOAT32 = "float32"
SMALL = 4096  # a weight with fewer elements gains less than its rows cost to convert
OUTLIER = 3.0  # an error this many times the median of the model's products stands out
NOTICEABLE = {"bf16": 0.01, "int8": 0.03}  # No error below this stands out.
SEARCHED = "a search compares its results"
STEP = 8  # an eighth of the weights goes back to float32 at a time
LINEAR = ("ActivationDropoutAndLinear",)  # Zipformer's linear layers that are no torch.nn.Linear, by class


Watch = Callable[[Tensor, Tensor | None, Tensor], None]  # called with x, bias and y of a product


@dataclass
class WeightRow:
    """One weight: its module's path, its format ("int8", "bf16" or "float32"), why it is float32, and the relative rms
    error of its product, where inputs measured it."""

    path: str
    shape: tuple
    format: str
    reason: str = ""
    error: float | None = None


@dataclass
class ReducedReport:
    """The weights of a model, the relative rms error of the model's outputs (None without inputs or outputs), and the
    bytes of these weights in float32 and as products read them."""

    format: str
    rows: list
    error: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0

    @property
    def reduced(self) -> list[WeightRow]:
        return [row for row in self.rows if row.format != FLOAT32]

    @property
    def summary(self) -> str:
        share = self.bytes_after / self.bytes_before if self.bytes_before else 1.0
        error = "" if self.error is None else f"; the outputs change by {self.error:.1e} (relative rms)"
        count = f"{len(self.reduced)} of {len(self.rows)} weights in {self.format}"
        return f"{count}: products read {share:.2f} of float32's bytes{error}"

    def every(self) -> list[str]:
        """Returns a line per weight, with the error of its product and the reason why it stays in float32."""
        lines = []
        for row in self.rows:
            error = "" if row.error is None else f"error {row.error:.1e}"
            parts = f"{row.path} {row.shape}: {row.format}", error, row.reason
            lines.append(", ".join(filter(None, parts)))
        return lines

    def lines(self) -> list[str]:
        """Returns a line per reason why weights stay in float32."""
        reasons: dict[str, list[WeightRow]] = {}
        for row in self.rows:
            if row.format == FLOAT32:
                reasons.setdefault(row.reason, []).append(row)
        return [
            f"float32: {len(rows)} x {rows[0].path} {rows[0].shape}: {reason}"
            for reason, rows in reasons.items()
        ]


def check(model: nn.Module, format: str, bound: float) -> None:
    """Raises ValueError unless ``accelerate`` can reduce the weights of this model."""
    if format not in _reduced_weights.FORMATS:
        stored = ": it only stores weights, in StreamingEncoder, GreedySearch and LabelLooping"
        raise ValueError(
            f"accelerate: weights: expected None or one of {', '.join(_reduced_weights.FORMATS)}, got {format!r}"
            + (stored if format == "fp16" else "")
        )
    if not 0 < bound < 1:
        raise ValueError(f"accelerate: weights_error: expected a number between 0 and 1, got {bound!r}")
    if model.training:
        raise ValueError(f"accelerate: weights={format!r} is for inference: call model.eval() first")


def keep(
    model: nn.Module,
    format: str,
    chosen: Callable[[str, nn.Module], bool],
    inputs: Any,
    bound: float,
    before: ModelState | None,
) -> ReducedReport:
    """Reduces the weights of ``model`` and returns a ReducedReport. An error leaves them as they were.

    chosen: a function (path, module) -> bool. inputs: as for ``verify``, or None. bound: the largest relative rms error
    of the outputs. before: the model's state, if there are inputs.
    """
    with _as_before_on_error(model):
        report = ReducedReport(format, [])
        whole = _reduced_weights.why_not(format)
        weights, searched = [], _searched(model)
        for path, module, weight, by_us in _weights(model):
            why_not = SEARCHED if id(weight) in searched else _why_not(weight, by_us)
            row = WeightRow(path, tuple(weight.shape), FLOAT32, whole or why_not)
            if not chosen(path, module):
                row.reason = "not selected"
            if not row.reason:
                row.format = format
                _reduced_weights.keep(weight, format)
            report.rows.append(row)
            weights.append(weight)
        kept = [pair for pair in zip(report.rows, weights, strict=True) if pair[0].format != FLOAT32]
        if kept and inputs is not None:
            given = () if callable(inputs) else (inputs,)
            with torch.no_grad(), ModelState(model, *given, whole=before) as state:
                _measure(kept, lambda: run(model, inputs), state, report, bound)
        for weight in weights:
            size, copy = weight.numel() * weight.element_size(), _reduced_weights.copy_of(weight)
            report.bytes_before += size
            report.bytes_after += size if copy is None else copy.bytes
        if report.reduced:
            vars(model)["train"] = types.MethodType(_train, model)
        return report


@contextmanager
def _as_before_on_error(model: nn.Module) -> Iterator[None]:
    earlier = [(p, copy.format) for p in model.parameters() if (copy := _reduced_weights.copy_of(p))]
    release(model)
    try:
        yield
    except BaseException:
        release(model)
        for weight, its_format in earlier:
            _reduced_weights.keep(weight, its_format)
        raise


def release(model: nn.Module) -> int:
    """Drops the copies of the model's weights. Returns how many there were."""
    if _was_reduced(model):
        del vars(model)["train"]
    return sum(_reduced_weights.drop(parameter) for parameter in model.parameters())


def why_exact(model: nn.Module) -> str:
    """Returns why a model whose weights were reduced runs in float32 now, or "" if it does not."""
    if not _was_reduced(model) or any(map(_reduced_weights.copy_of, model.parameters())):
        return ""
    return "other parameters are in the place of the reduced ones: call accelerate with weights= again"


def _was_reduced(model: nn.Module) -> bool:
    return getattr(vars(model).get("train"), "__func__", None) is _train


def _train(self: nn.Module, mode: bool = True) -> nn.Module:
    kept = any(_reduced_weights.copy_of(parameter) for parameter in self.parameters())  # not in a deepcopy
    if mode and kept and not _reduced_weights.is_suspended():  # as inside verify
        raise RuntimeError(
            f"{type(self).__name__}.train: its weights are reduced for inference (fastasr.accelerate with weights=); "
            "call fastasr.restore(model) first"
        )
    return type(self).train(self, mode)


_train.__name__ = "train"  # a bound method pickles by name: upstream's own is found on loading


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter, bool]]:
    """Yields (path, module, weight, whether fastasr computes the product) of each linear layer, each weight once."""
    seen, swapped = set(), []
    for path, module in model.named_modules():
        if binding.bound_forward(module) is not None or type(module).__module__.startswith("fastasr."):
            swapped.append(path + "." if path else "")
        weight = getattr(module, "weight", None)
        convolves = isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d)
        pointwise = convolves and set(module.kernel_size) == {1} and module.groups == 1
        linear = isinstance(module, torch.nn.Linear) or type(module).__name__ in LINEAR
        if not (linear or pointwise) or id(weight) in seen:
            continue
        seen.add(id(weight))
        if isinstance(weight, torch.nn.Parameter):
            yield path, module, weight, any((path + ".").startswith(owner) for owner in swapped)


def _searched(model: nn.Module) -> set[int]:
    """Returns the ids of the parameters of predictors and joint networks whose transducers greedy search knows."""
    predictors = filter(None, map(find_predictor, model.modules()))
    return {id(w) for predictor in predictors for part in predictor.parts() for w in part.parameters()}


def _why_not(weight: nn.Parameter, by_us: bool) -> str:
    if weight.dtype is not torch.float32 or not weight.is_cpu:
        return f"it is {str(weight.dtype).removeprefix('torch.')} on {weight.device.type}, not float32 on the CPU"
    if not by_us:
        return "no kernel of fastasr's computes its product"
    if weight.numel() < SMALL:
        return f"too small: fewer than {SMALL} elements"
    if weight[0].numel() > _reduced_weights.MOST_INPUTS:
        return f"more than {_reduced_weights.MOST_INPUTS} inputs"
    return ""


def _measure(
    kept: list[tuple[WeightRow, nn.Parameter]],
    run: Callable[[], Any],
    state: ModelState,
    report: ReducedReport,
    bound: float,
) -> None:
    with _reduced_weights.suspended():
        expected = _outputs(run())
    sums: dict[str, list[float]] = {}
    for row, weight in kept:
        _set_watch(weight, _watch(weight, sums.setdefault(row.path, [0.0, 0.0])))
    state.restore()
    report.error = _error(_outputs(run()), expected)
    for row, weight in kept:
        _set_watch(weight, None)
        difference, size = sums[row.path]
        row.error = (difference / size) ** 0.5 if size else None
    reached = sorted(r.error for r, _ in kept if r.error is not None)
    limit = max(NOTICEABLE[report.format], OUTLIER * reached[len(reached) // 2]) if reached else 0.0
    for row, weight in kept:
        if row.error is None:
            _give_back(row, weight, "the inputs of verify do not reach it")
        elif not row.error <= limit:
            _give_back(row, weight, f"its error of {row.error:.1e} stands out")
    while True:
        state.restore()
        report.error = _error(_outputs(run()), expected)
        left = sorted((p for p in kept if p[0].format != FLOAT32), key=lambda pair: -(pair[0].error or 0.0))
        if report.error is None or report.error <= bound or not left:
            return
        for row, weight in left[: max(1, len(left) // STEP)]:
            _give_back(row, weight, f"the outputs would change by more than {bound:g}")


def _give_back(row: WeightRow, weight: nn.Parameter, reason: str) -> None:
    row.format, row.reason = FLOAT32, reason
    _reduced_weights.drop(weight)


def _set_watch(weight: nn.Parameter, watch: Watch | None) -> None:
    copy = _reduced_weights.copy_of(weight)
    if copy is not None:
        copy.watch = watch


def _watch(weight: nn.Parameter, sums: list[float]) -> Watch:
    def watch(x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        exact = F.linear(x, weight.flatten(1), bias).double()
        sums[0] += (y - exact).square().sum().item()
        sums[1] += exact.square().sum().item()

    return watch


def _outputs(result: Any) -> list[Tensor]:
    leaves = tree_flatten(dict(result) if hasattr(result, "keys") else result)[0]
    return [t.detach().double() for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


def _error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float | None:
    """Returns the largest relative rms error of the outputs, infinity if one has another shape or a NaN, and None if
    there are none."""
    errors = []
    for a, b in zip(got, expected, strict=True):
        size = b.square().sum().item() if a.shape == b.shape else 0.0
        error = ((a - b).square().sum().item() / size) ** 0.5 if size else float(a.numel() > 0)
        errors.append(error if error == error else float("inf"))
    return max(errors, default=None)
