# SPDX-License-Identifier: Apache-2.0
"""k2's transducer and Swoosh functions, under k2's names.

    import fastasr.compat.k2
    fastasr.compat.k2.install()     # before the code that says `import k2`

From then on ``import k2`` gives this module. It does not provide the other parts of k2 (finite-state automata, ragged
tensors): the use of such a name raises an error that says so. The names of k2's classes exist, for annotations for
example, but the classes cannot be used.
"""

import functools
import math
import sys
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastasr import ops
from fastasr.rnnt import (
    do_rnnt_pruning,
    get_hat_logprobs_pruned,
    get_rnnt_logprobs,
    get_rnnt_logprobs_joint,
    get_rnnt_logprobs_pruned,
    get_rnnt_logprobs_smoothed,
    get_rnnt_prune_ranges,
    get_rnnt_prune_ranges_deprecated,
    joint_mutual_information_recursion,
    losses,
    mutual_information_recursion,
    rnnt_loss,
    rnnt_loss_simple,
    rnnt_loss_smoothed,
)

__all__ = [
    "NotProvided",
    "do_rnnt_pruning",
    "get_hat_logprobs_pruned",
    "get_rnnt_logprobs",
    "get_rnnt_logprobs_joint",
    "get_rnnt_logprobs_pruned",
    "get_rnnt_logprobs_smoothed",
    "get_rnnt_prune_ranges",
    "get_rnnt_prune_ranges_deprecated",
    "install",
    "joint_mutual_information_recursion",
    "mutual_information_recursion",
    "rnnt_loss",
    "rnnt_loss_pruned",
    "rnnt_loss_simple",
    "rnnt_loss_smoothed",
    "swoosh_l",
    "swoosh_l_forward",
    "swoosh_l_forward_and_deriv",
    "swoosh_r",
    "swoosh_r_forward",
    "swoosh_r_forward_and_deriv",
    "uninstall",
    "with_cuda",
]

_NAME = "k2"


# --------------------------------------------------------------------------- under the name k2
def install() -> None:
    """Makes ``import k2`` give this module. It does not help a module that failed to import k2 before.

    Raises:
        RuntimeError: k2 itself is loaded already, so code that uses it would not see the change.
    """
    present = sys.modules.get(_NAME)
    if present is not None and present is not sys.modules[__name__]:
        raise RuntimeError(
            f"fastasr.compat.k2.install: expected that k2 is not loaded yet, got "
            f"{getattr(present, '__file__', present)}; install first, or leave k2 out of the environment"
        )
    sys.modules[_NAME] = sys.modules[__name__]


def uninstall() -> None:
    """Undoes ``install``: ``import k2`` finds k2 itself again, if it is installed."""
    if sys.modules.get(_NAME) is sys.modules[__name__]:
        del sys.modules[_NAME]


# --------------------------------------------------------------------------- losses
@functools.wraps(losses.rnnt_loss_pruned)
def rnnt_loss_pruned(
    logits: Tensor,
    symbols: Tensor,
    ranges: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str | None = "mean",
    use_hat_loss: bool = False,
    return_grad: bool = False,
    **options: Any,
) -> Any:
    arguments = logits, symbols, ranges, termination_symbol, boundary
    narrow = rnnt_type == "constrained" and ranges.shape[-1] == 1 and symbols.shape[1] > 0
    if not narrow or return_grad:
        return losses.rnnt_loss_pruned(
            *arguments, rnnt_type, delay_penalty, reduction, use_hat_loss, return_grad, **options
        )
    # In a constrained lattice windows of one emit no symbol. fastasr.rnnt raises an error, k2 returns inf.
    finite: Any = losses.rnnt_loss_pruned(
        *arguments, "modified", delay_penalty, "none", use_hat_loss, **options | {"zero_infinity": False}
    )
    emits = torch.ones_like(finite, dtype=torch.bool) if boundary is None else boundary[:, 2] > boundary[:, 0]
    loss = finite.masked_fill(emits, math.inf)
    return losses.reduced("compat.k2.rnnt_loss_pruned", loss, reduction, options.get("zero_infinity", False))


# --------------------------------------------------------------------------- Swoosh
def swoosh_l(x: Tensor, dropout_prob: float = 0.0) -> Tensor:
    """Returns log(1 + e^(x − 4)) − 0.08 x − 0.035, with dropout if x requires a gradient.

    k2 stores the derivative in 8 bits with random rounding; ours is exact.
    """
    return _dropout(x, ops.swoosh_l(x), dropout_prob)


def swoosh_r(x: Tensor, dropout_prob: float = 0.0) -> Tensor:
    """Returns log(1 + e^(x − 1)) − 0.08 x − 0.313261687, with dropout if x requires a gradient."""
    return _dropout(x, ops.swoosh_r(x), dropout_prob)


def swoosh_l_forward(x: Tensor) -> Tensor:
    """Returns SwooshL(x) without a gradient."""
    with torch.no_grad():
        return ops.swoosh_l(x)


def swoosh_r_forward(x: Tensor) -> Tensor:
    """Returns SwooshR(x) without a gradient."""
    with torch.no_grad():
        return ops.swoosh_r(x)


def swoosh_l_forward_and_deriv(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (SwooshL(x), its derivative σ(x − 4) − 0.08), without gradients."""
    return swoosh_l_forward(x), _derivative(x, 4.0)


def swoosh_r_forward_and_deriv(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (SwooshR(x), its derivative σ(x − 1) − 0.08), without gradients."""
    return swoosh_r_forward(x), _derivative(x, 1.0)


def _dropout(x: Tensor, y: Tensor, probability: float) -> Tensor:
    if probability and x.requires_grad:
        return torch.nn.functional.dropout(y, probability)
    return y


@torch.no_grad()
def _derivative(x: Tensor, shift: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (torch.sigmoid(wide - shift) - 0.08).to(x.dtype)


# --------------------------------------------------------------------------- what is not provided
class NotProvided(AttributeError):
    """Raised if code uses a part of k2 that fastasr does not provide."""


def _message(name: str) -> str:
    return (
        f"k2.{name}: fastasr.compat.k2, which stands in for k2 here, has k2's transducer and Swoosh functions only; "
        f"{name} needs k2 itself"
    )


class _Absent(type):
    """The type of k2's classes that are not provided: they can be named in annotations and nothing else."""

    def __call__(cls, *args: object, **kwargs: object) -> NoReturn:
        raise NotProvided(_message(cls.__name__))

    def __getattr__(cls, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotProvided(_message(cls.__name__))


_CLASSES = (
    "CtcLoss",
    "DecodeStateInfo",
    "DenseFsaVec",
    "DeterminizeWeightPushingType",
    "Fsa",
    "MWERLoss",
    "Nbest",
    "OnlineDenseIntersecter",
    "RaggedShape",
    "RaggedTensor",
    "RnntDecodingConfig",
    "RnntDecodingStream",
    "RnntDecodingStreams",
    "SymbolTable",
)


class _Flag:
    """``k2.with_cuda``, which is a flag in k2 and a function in fast_rnnt. It is true if GPU kernels can run."""

    def __bool__(self) -> bool:
        return torch.cuda.is_available()

    __call__ = __bool__

    def __repr__(self) -> str:
        return repr(bool(self))


with_cuda = _Flag()


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        made = globals()[name] = _Absent(name, (), {"__module__": __name__, "__doc__": _message(name)})
        return made
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    raise NotProvided(_message(name))
