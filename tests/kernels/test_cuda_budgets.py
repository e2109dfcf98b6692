# SPDX-License-Identifier: Apache-2.0
"""Registers, stack and static shared memory of every CUDA kernel in the built library, for each architecture that it is
compiled for, against ``cuda_budgets.toml``. GPUs of capability 8.6 and 8.9 run the code of sm_80.

    python tests/kernels/test_cuda_budgets.py     prints the file for the library as it is built

No GPU is needed: ``cuobjdump`` (of the CUDA toolkit, or of Triton's wheel) reads them from the library. A stack is
where spilled registers go, so it must be 0. Dynamic shared memory is the launchers' choice:
csrc/tests/cuda_ema_scan.cpp.
"""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from fastasr.ops import _dispatch

BUDGETS = Path(__file__).with_name("cuda_budgets.toml")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")


def _cuobjdump() -> str | None:
    found = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    if found:
        return found
    try:
        import triton
    except ImportError:
        return None
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else None


def _readable(mangled: str) -> str:
    """Returns ``scan_tiles<complex float, adjoint>`` for the mangled name of a kernel in fastasr::cuda."""
    name = re.match(r"_ZN7fastasr4cuda(\d+)(.*)", mangled)
    if name is None:
        return mangled
    length, rest = int(name[1]), name[2]
    arguments = re.match(r"I((?:[fd]|NS0_7ComplexI[fd]EE)+)(?:LNS0_8ScanModeE(\d)E)?E", rest[length:])
    if arguments is None:
        return mangled
    types = [
        ("complex " if prefix else "") + {"f": "float", "d": "double"}[letter]
        for prefix, letter in re.findall(r"(NS0_7ComplexI)?([fd])", arguments[1])
    ]
    mode = {None: [], "0": ["output"], "1": ["chain"], "2": ["adjoint"]}[arguments[2]]
    return f"{rest[:length]}<{', '.join(types + mode)}>"


def measure() -> dict[str, dict[str, list[int]]]:
    """Returns {kernel: {architecture: [registers, stack, static shared memory]}}."""
    dump = subprocess.run(
        [_cuobjdump(), "--dump-resource-usage", _dispatch.NATIVE_LIBRARY],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found, architecture, name = {}, None, None
    for line in dump.splitlines():
        if line.startswith("arch ="):
            architecture = line.split()[-1]
        elif function := re.match(r"\s*Function (\S+):", line):
            name = _readable(function[1])
        elif architecture in ARCHITECTURES and "probe" not in (name or "probe"):
            usage = re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line)
            if usage is None:
                continue
            registers, stack, shared, local = map(int, usage.groups())
            # from sm_90 on it counts 1 KB that the system keeps for itself in every block
            shared = shared if architecture == "sm_80" else max(0, shared - 1024)
            found.setdefault(name, {})[architecture] = [registers, stack + local, shared]
    return found


def _why_not() -> str:
    if _dispatch.why_not_native():
        return _dispatch.why_not_native()
    if _dispatch.native_build_info()["cuda_architectures"] is None:
        return "the native library was built without CUDA (no nvcc)"
    return "" if _cuobjdump() else "there is no cuobjdump"


@pytest.mark.skipif(bool(_why_not()), reason=_why_not())
def test_resources():
    budgets = tomllib.loads(BUDGETS.read_text())
    compiler = _dispatch.native_build_info()["nvcc"]
    measured = measure()
    assert all(values[1] == 0 for of_kernel in measured.values() for values in of_kernel.values())
    if not compiler.startswith(budgets.pop("nvcc") + "."):
        pytest.skip(f"no register budgets for nvcc {compiler}")
    advice = "kernels came or went: run python tests/kernels/test_cuda_budgets.py"
    assert sorted(measured) == sorted(budgets), advice
    over = [
        f"{name}, {architecture}: {values}, budget {budgets[name][architecture]}"
        for name, of_kernel in measured.items()
        for architecture, values in of_kernel.items()
        if any(value > most for value, most in zip(values, budgets[name][architecture], strict=True))
    ]
    assert not over, "\n".join(over)


@pytest.mark.skipif(bool(_why_not()), reason=_why_not())
def test_every_architecture_is_in_the_library():
    dump = subprocess.run(
        [_cuobjdump(), "--list-elf", _dispatch.NATIVE_LIBRARY], capture_output=True, text=True
    ).stdout
    for architecture in _dispatch.native_build_info()["cuda_architectures"].split(","):
        assert f"sm_{architecture.removesuffix('-real')}" in dump


def _print() -> None:
    version = ".".join(_dispatch.native_build_info()["nvcc"].split(".")[:2])
    print(
        "# SPDX-License-Identifier: Apache-2.0\n"
        "# What each CUDA kernel may use: [registers per thread, bytes of stack and local memory (spills; always 0),\n"
        "# bytes of static shared memory]. Checked and printed by test_cuda_budgets.py.\n"
        f'nvcc = "{version}"\n'
    )
    measured = measure()
    width = max(map(len, measured)) + 2
    for name in sorted(measured):
        cells = ", ".join(f"{key} = {measured[name][key]}" for key in ARCHITECTURES)
        quoted = f'"{name}"'
        print(f"{quoted:{width}} = {{ {cells} }}")


if __name__ == "__main__":
    _print()
