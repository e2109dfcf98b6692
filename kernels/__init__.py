# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, one file per op: the formula, the bytes it has to move, the kernel, the launcher.

A file whose name begins with an underscore holds no op: it holds pieces that several files share, or the second half of
a long file.

Each file needs Triton and is imported when its op first runs on a device, so importing this package never fails. A
launcher takes contiguous tensors on one device, runs on that device's current stream, never waits for the device, and
returns new tensors. It starts kernels by ``_launch.launch`` alone, which sets device and stream. Kernels read and write
float32, bfloat16 and float16; they compute and accumulate in float32.
"""


class Unlaunchable(RuntimeError):
    """The device cannot run a kernel, or Triton cannot compile it for the device."""
