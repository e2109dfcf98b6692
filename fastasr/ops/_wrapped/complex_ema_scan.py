# SPDX-License-Identifier: Apache-2.0
"""The public complex_ema_scan, and its formula, also take and return states as complex numbers. The operator and the
declared formula know real and imaginary parts alone.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from fastasr.ops._op import OPS
from fastasr.ops._written.complex_ema_scan import complex_ema_scan as with_real_states

COMPLEX = (torch.complex64, torch.complex128)

op = OPS["complex_ema_scan"]


F = TypeVar("F", bound=Callable)


def _complex_states(scan: F) -> F:
    @functools.wraps(scan)
    def function(  # the names stand here once more because *arguments and **options take a tenth of a small call's time
        x: Tensor, alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor, omega: Tensor | None = None, *,
        state: Tensor | None = None, return_state: bool = False, padding_mask: Tensor | None = None,
        truncation: int | None = None, direction: str = "forward", activation: str = "identity", layout: str = "LBD",
    ) -> Any:  # fmt: skip
        is_complex = False
        if isinstance(state, Tensor) and state.dim() == 3 and state.dtype in COMPLEX:
            is_complex, state = True, torch.view_as_real(state.resolve_conj())
        found = scan(
            x, alpha, delta, theta, gamma, omega, padding_mask=padding_mask, return_state=return_state,
            state=state,
            truncation=truncation, direction=direction, activation=activation, layout=layout,
        )  # fmt: skip
        if return_state and (state is None or is_complex):
            return found[0], torch.view_as_complex(found[1])
        return found

    return cast(F, function)


definition = _complex_states(op.definition)
complex_ema_scan = _complex_states(with_real_states)
complex_ema_scan.__module__ = __name__  # where pickle finds it
op.serve(complex_ema_scan, definition=definition)
