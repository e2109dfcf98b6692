# SPDX-License-Identifier: Apache-2.0
"""The launch of a kernel: every launcher calls :func:`launch`, and nothing else starts a kernel.

Triton takes the current device and its stream, whatever device the tensors are on, and looks up the compiled kernel at
every launch by all arguments and options, which takes longer on the host than most kernels take on the device.
"""

from collections.abc import Callable
from functools import cache

import torch
from triton.errors import TritonError
from triton.knobs import runtime
from triton.runtime import JITFunction, driver

from fastasr.kernels import Unlaunchable

# Keyed by all that selects the code: the kernel, what Triton compiled of it, and the constants behind the arguments.
_compiled: dict[tuple, tuple] = {}

# The one precision that ``tl.dot`` may take for operands of float32: their own, or TF32's.
PRECISE = {"allowed_dot_input_precisions": ("ieee",)}
ROUNDED = {"allowed_dot_input_precisions": ("tf32",)}


def launch(kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Runs ``grid`` programs of a kernel on the device of the tensors among ``arguments``, on its current stream.

    ``arguments`` are the kernel's tensors, numbers and None, in order; ``constants`` are its constants and Triton's
    options by name. Triton's own launch serves the first call of each combination of dtypes, alignments, constants and
    device; the others run what it compiled. Raises ValueError for tensors on several devices, and Unlaunchable where
    the device lacks the memory or registers for a program, or the kernel does not compile for it.
    """
    if not isinstance(kernel, JITFunction):
        _interpret(kernel, grid, arguments, **constants)
        return
    device, values = None, []
    key = [id(kernel), tuple(constants), *constants.values()]
    for argument in arguments:
        kind = type(argument)
        if kind is int:  # Triton compiles 1, multiples of 16 and numbers of more than 32 bits apart
            kind = 1 if argument == 1 else 0 if argument & 15 else 16
            if not -(2**31) <= argument < 2**31:
                kind += 2
        elif argument is not None and kind is not float and kind is not bool:
            here = argument.get_device()
            if here != device:
                if device is not None or here < 0:
                    _refuse(kernel, arguments)
                device = here
            kind = argument.dtype
            argument = argument.data_ptr()  # Triton would ask the driver about a tensor, not about an address
            if argument & 15:
                key.append("unaligned")
        key.append(kind)
        values.append(argument)
    key.append(device)
    key = tuple(key)
    found = _compiled.get(key)
    active = driver.active
    if device != active.get_current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, *arguments, **constants)
    elif found is None:
        try:
            compiled = kernel[grid](*arguments, **PRECISE | constants)
        except TritonError as error:
            raise Unlaunchable(f"{kernel.__name__}: {error}") from error
        rest = [constants[name] for name in kernel.arg_names[len(arguments) :]]
        _compiled[key] = kernel, compiled, compiled.run, compiled.function, compiled.packed_metadata, rest
    else:
        _, compiled, run, function, packed, rest = found
        x, y, z = (*grid, 1, 1)[:3]
        stream, metadata = active.get_current_stream(device), None
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            metadata = compiled.launch_metadata((x, y, z), stream, *values, *rest)
        else:  # Triton would describe every launch, also to a chain without hooks.
            enter = leave = None
        run(x, y, z, stream, function, packed, metadata, enter, leave, *values, *rest)


# Triton's own cdiv and next_power_of_2 unwrap constants of kernels first, which costs 2.5 to 4.3 us a call on the host.
def cdiv(a: int, b: int) -> int:
    """Returns a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Returns the smallest power of 2 that is at least ``n``, for n > 0."""
    return 1 << (n - 1).bit_length()


def contiguous_like(t: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Returns an empty tensor of t's shape, in half the time that ``torch.empty`` takes to read a shape."""
    return torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)


def generation(t: torch.Tensor) -> int:
    """Returns the compute capability that tile tables are for, as 80, 90, 100 or 120, nearest to the tensor's device.
    Tensor cores read 16-bit operands from registers on 80 and 120, from shared memory on 90 and 100.
    """
    return _machine(t.get_device())[0]


def processors(t: torch.Tensor) -> int:
    """Returns how many multiprocessors the tensor's device has: 128 where there is no device, as in the interpreter."""
    return _machine(t.get_device())[1]


@cache  # torch takes several us to tell
def _machine(device: int) -> tuple[int, int]:
    if device < 0:
        return 80, 128
    major, _ = torch.cuda.get_device_capability(device)
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return (10 * major if major in (9, 10, 12) else 80), count


def rounded(dtype: torch.dtype) -> bool:
    """Returns whether products of this dtype are rounded to TF32: those of float32 where torch's own may be
    (``torch.backends.cuda.matmul.fp32_precision``, ``allow_tf32``).
    """
    return dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


@cache
def chosen(tiles: Callable[..., dict], rounded: bool, *arguments) -> dict[str, dict]:
    """Returns ``tiles(*arguments)``, which asks ``rounded`` too. It takes longer on the host than a launch."""
    return tiles(*arguments)


def dot_options(dtype: torch.dtype) -> dict[str, tuple[str]]:
    """Returns Triton's options for a kernel with products of this dtype."""
    return ROUNDED if rounded(dtype) else PRECISE


def _interpret(kernel, grid, arguments, allowed_dot_input_precisions=("ieee",), **constants) -> None:
    from triton.runtime import interpreter

    options = interpreter.InterpreterOptions(allowed_dot_input_precisions=allowed_dot_input_precisions)
    interpreter.interpreter_builder.options = options
    kernel[grid](*arguments, **constants)


def _refuse(kernel, arguments) -> None:
    tensors = ((i, t) for i, t in enumerate(arguments) if isinstance(t, torch.Tensor))
    found = ", ".join(f"{kernel.arg_names[i]} on {t.device}" for i, t in tensors)
    raise ValueError(f"fastasr.kernels: {kernel.__name__}: expected tensors on one CUDA device, got {found}")


def as_bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Returns a bool mask as the numbers 0 and 1, which kernels read."""
    return None if mask is None else mask.view(torch.uint8)
