# SPDX-License-Identifier: Apache-2.0
"""Builds ``fastasr/libfastasr.so`` with CMake and Ninja.

Environment:
  FASTASR_NATIVE=0   install without the native library (every op then runs in eager and says so)
  FASTASR_CUDA=0|1   never | always compile csrc/cuda; default: when nvcc is found
  MAX_JOBS           parallel compile jobs
  CMAKE_ARGS         further arguments for CMake
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc") or next((p for p in ("/usr/local/cuda/bin/nvcc",) if os.path.exists(p)), None)


def with_cuda() -> bool:
    forced = os.environ.get("FASTASR_CUDA")
    if forced not in (None, "", "0", "1"):
        raise SystemExit(f"FASTASR_CUDA: expected 0 or 1, got {forced!r}")
    if forced:
        if forced == "1" and find_nvcc() is None:
            raise SystemExit("FASTASR_CUDA=1, but nvcc was not found: set CUDA_HOME or put nvcc on PATH")
        return forced == "1"
    return find_nvcc() is not None


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11
        import torch

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        cuda = with_cuda()
        config = [
            "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTASR_TORCH={Path(torch.__file__).resolve().parent}",
            f"-DFASTASR_CUDA={'ON' if cuda else 'OFF'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DFASTASR_MODULE_FILE={target.name}",
        ]  # fmt: skip
        if cuda:
            config.append(f"-DCMAKE_CUDA_COMPILER={find_nvcc()}")
        config += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run(config, check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", str(build), "-j", jobs], check=True)

    def copy_extensions_to_source(self) -> None:
        """Copies the library too: an editable install imports what lies beside the sources."""
        super().copy_extensions_to_source()
        sources = Path(self.get_finalized_command("build_py").get_package_dir("fastasr"))
        for library in Path(self.build_lib, "fastasr").glob("libfastasr.*"):
            self.copy_file(str(library), str(sources / library.name))


class AnyPython(bdist_wheel):
    """Tags the wheel for every Python 3: the library knows none, and without ``_build_info`` nothing is missed but how
    the library was built.
    """

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


def packages(folder: str, name: str) -> list[str]:
    """Every package under ``folder``, named as it is imported, but those that need a checkout."""
    found = [folder, *(f"{folder}.{p}" for p in find_packages(folder, exclude=["studies", "studies.*"]))]
    return [name + p[len(folder) :] for p in found]


setup(
    package_dir={"fastasr": "fastasr", "fastasr.kernels": "kernels", "fastasr.benchmarks": "benchmarks"},
    packages=[
        *packages("fastasr", "fastasr"),
        *packages("kernels", "fastasr.kernels"),
        *packages("benchmarks", "fastasr.benchmarks"),
    ],
    include_package_data=False,  # what the source distribution holds beside code (benchmark rows) stays out of wheels
    package_data={"": ["*.html", "*.toml", "*.json", "py.typed"]},
    ext_modules=[Extension("fastasr._build_info", [])]
    if os.environ.get("FASTASR_NATIVE", "1") != "0"
    else [],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPython},
)
