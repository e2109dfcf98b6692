# SPDX-License-Identifier: Apache-2.0
"""Compiles the CUDA launchers over the emulation of csrc/tests: the backend of cuda_launchers.py then
computes on the CPU what the GPU would, operation by operation.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch

from tests.kernels.cuda_launchers import load

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("c++")


def build(folder: Path) -> ctypes.CDLL:
    target = folder / "libcuda_emulated.so"
    capability = torch.backends.cpu.get_cpu_capability()
    # fused multiply-add, if the machine has it: nvcc contracts in the same way
    fused = ["-mfma", "-ffp-contract=fast"] if capability.startswith("AVX") else []
    command = [compiler(), "-std=c++20", "-O2", *fused, "-w", "-shared", "-fPIC", f"-I{CSRC}"]
    subprocess.run([*command, "-x", "c++", str(CSRC / "cuda" / "ema_scan.cu"), "-o", str(target)], check=True)
    return load(target)
