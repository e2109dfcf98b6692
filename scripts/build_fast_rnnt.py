# SPDX-License-Identifier: Apache-2.0
"""Installs the PyPI package fast_rnnt into the running Python: its CPU sources, compiled against the installed torch.

    python scripts/build_fast_rnnt.py SOURCES   # the unpacked source distribution

Upstream's own build asks for a CMake and a torch of its day. Its three C++ files compile unchanged as a torch extension
in C++20, in under a minute. Tests compare fastasr.rnnt with it, and benchmarks measure it.
"""

import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch.utils.cpp_extension as extension

SOURCES = {
    "fast_rnnt/csrc/mutual_information_cpu.cu": "mutual_information_cpu.cpp",
    "fast_rnnt/python/csrc/mutual_information.cu": "bindings.cpp",
    "fast_rnnt/python/csrc/fast_rnnt.cu": "module.cpp",
}


def main(root: Path) -> None:
    packages = Path(sysconfig.get_path("purelib"))
    # scripts/python_headers.sh puts Python.h here if it is missing.
    definition = "-DPython_INCLUDE_DIR="
    cmake = shlex.split(os.environ.get("CMAKE_ARGS", ""))
    headers = [argument.removeprefix(definition) for argument in cmake if argument.startswith(definition)]
    with tempfile.TemporaryDirectory() as folder:
        build = Path(folder)
        for source, name in SOURCES.items():
            shutil.copy(root / source, build / name)
        extension.load(
            name="_fast_rnnt",
            sources=[str(build / name) for name in SOURCES.values()],
            extra_include_paths=[str(root), *headers],
            # These flags are those of upstream's release build.
            extra_cflags=["-O3", "-DNDEBUG", "-std=c++20", *shlex.split(os.environ.get("CXXFLAGS", ""))],
            build_directory=str(build),
        )
        shutil.copytree(root / "fast_rnnt/python/fast_rnnt", packages / "fast_rnnt", dirs_exist_ok=True)
        shutil.copy(build / "_fast_rnnt.so", packages)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
