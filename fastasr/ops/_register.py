# SPDX-License-Identifier: Apache-2.0
"""Registration of ``torch.ops.fastasr.<name>``: implementation, fake, autograd and autocast rule of an op."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl

from fastasr._transforms import is_transformed, refuse_unless_batched

LIBRARY = torch.library.Library("fastasr", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)


def register(
    schema: str,
    implementation: Callable,
    fake: Callable,
    *,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    autocast: Callable | None = None,
    transformed: Callable | None = None,
) -> torch._ops.OpOverload:
    """Defines an op from its schema. ``autocast(dtype, *args)`` returns the arguments cast for autocast's dtype.

    ``transformed(*args)`` computes it from operators that transforms know, see :mod:`fastasr._transforms`; without
    it they are refused.

    An op without ``backward`` is itself a backward: differentiating through it raises.
    """
    name = schema.split("(", 1)[0]
    qualified = f"fastasr::{name}"
    LIBRARY.define(schema, tags=_TAGS)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    if backward is None:
        backward = partial(refuse_double_backward, name.removesuffix("_backward"))
    op = getattr(torch.ops.fastasr, name).default
    kernel = make_autograd_impl(op, Info(backward, setup_context))  # as torch.library.register_autograd does
    if transformed is not None:
        LIBRARY.impl(name, transformed, "FuncTorchBatched")
    LIBRARY.impl(name, _unless_transformed(name, kernel, transformed), "Autograd", with_keyset=True)
    if autocast is not None:
        for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            LIBRARY.impl(name, _autocast_kernel(op, device_type, key, autocast), key)
    return op


def _unless_transformed(name: str, kernel: Callable, transformed: Callable | None) -> Callable:
    def run(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if transformed is not None and is_transformed():
            return transformed(*args)
        refuse_unless_batched(name.removesuffix("_backward"))
        return kernel(keyset, *args)

    return run


def _autocast_kernel(op: torch._ops.OpOverload, device_type: str, key: str, autocast: Callable) -> Callable:
    dispatch_key = getattr(torch._C.DispatchKey, key)

    def kernel(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(dispatch_key)):
            return op(*autocast(torch.get_autocast_dtype(device_type), *args))

    return kernel


def refuse_double_backward(name: str, *_: object) -> NoReturn:
    """Raises RuntimeError. A backward on the direct path calls this if grad mode is on at its start, as only
    ``create_graph=True`` makes it.
    """
    raise RuntimeError(
        f"fastasr.{name}: gradients of gradients are not implemented by the kernels; "
        f"compute them under `with fastasr.backend('eager'):`"
    )


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Returns the dtype that autocast asks for on this tensor's device, or None outside autocast."""
    if not torch._C._is_any_autocast_enabled():  # The type of a device is a string, made anew each time.
        return None
    device_type = x.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Returns a context in which autocast does not round products of tensors on this device."""
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Applies autocast's rule for arguments: floating tensors except float64 take ``dtype``, and None stays None."""
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype is not torch.float64 else t
        for t in tensors
    )
