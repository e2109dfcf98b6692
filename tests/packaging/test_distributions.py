# SPDX-License-Identifier: Apache-2.0
"""The contents of the source distribution, the wheels and the native library."""

import os
import re
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import kernel_abi_check
import pytest
from fresh import ROOT, run

pytestmark = pytest.mark.packaging


def _names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_sdist_holds_every_source(sdist):
    with tarfile.open(sdist) as archive:
        names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    for folder, patterns in {
        "csrc": ("*.cpp", "*.h", "*.cu", "*.map", "CMakeLists.txt"),
        "fastasr": ("*.py", "*.html"),
        "kernels": ("*.py",),
        "benchmarks": ("*.py", "*.html"),
        "tests": ("*.py", "*.toml"),
        "scripts": ("*.sh", "*.txt"),
        "docs": ("*.md",),
    }.items():
        wanted = {
            p.relative_to(ROOT).as_posix() for pattern in patterns for p in (ROOT / folder).rglob(pattern)
        }
        wanted = {n for n in wanted if "__pycache__" not in n}
        assert wanted - names == set(), f"{folder} is not complete"
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md", "Makefile"} <= names
    assert not [n for n in names if n.endswith((".so", ".pyc"))]


def test_the_wheel_holds_the_package_alone(wheel):
    names = _names(wheel)
    libraries = sorted(n for n in names if n.endswith(".so"))
    assert re.fullmatch(r"fastasr/_build_info\.[\w-]+\.so fastasr/libfastasr\.so", " ".join(libraries))
    for source, target in {
        "fastasr": "fastasr",
        "kernels": "fastasr/kernels",
        "benchmarks": "fastasr/benchmarks",
    }.items():
        wanted = {
            f"{target}/{p.relative_to(ROOT / source).as_posix()}"
            for pattern in ("*.py", "*.html", "py.typed")
            for p in (ROOT / source).rglob(pattern)
            if "studies" not in p.parts
        }
        assert wanted - set(names) == set()
    top = {n.split("/", 1)[0] for n in names}
    assert top == {"fastasr", "fastasr-0.1.0.dist-info"}
    assert not [n for n in names if n.endswith((".cpp", ".h", ".cu", ".map", ".jsonl"))]
    assert not [
        n for n in names if n.startswith(("fastasr/tests", "fastasr/csrc", "fastasr/benchmarks/studies"))
    ]


def test_the_pure_wheel_serves_every_machine(pure_wheel):
    assert pure_wheel.name == "fastasr-0.1.0-py3-none-any.whl"
    assert not [n for n in _names(pure_wheel) if n.endswith(".so")]


def _nvcc() -> bool:
    homes = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), "/usr/local/cuda"]
    return bool(shutil.which("nvcc") or any(home and (Path(home) / "bin/nvcc").exists() for home in homes))


@pytest.fixture(scope="module", params=["here", "aarch64"])
def built(request, tmp_path_factory) -> tuple[Path, Path]:
    """Returns a wheel with the native library, and that library: this machine's, and aarch64's if it was built."""
    if request.param == "here":
        return request.getfixturevalue("wheel"), request.getfixturevalue("library")
    wheel = next(iter((ROOT / "build/dist-aarch64").glob("*.whl")), None)
    if wheel is None:
        pytest.skip("`scripts/build_dist.sh PYTHON aarch64` has not been run")
    folder = tmp_path_factory.mktemp("aarch64")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [n for n in archive.namelist() if n.endswith(".so")])
    return wheel, folder / "fastasr/libfastasr.so"


def _promised_glibc() -> dict[bool, int]:
    """Returns N of glibc 2.N that docs/install.md promises for a wheel: with CUDA code or not -> N."""
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| C\+\+ (.+?) \| `manylinux_2_(\d+)` \| glibc 2\.(\d+) or newer \|$", page, re.MULTILINE
    )
    assert all(name == promised for _, name, promised in rows)
    return {what.startswith("and CUDA"): int(promised) for what, _, promised in rows}


def test_one_wheel_serves_every_python_and_old_systems(built):
    """CUDA's static library takes functions that a newer glibc has moved; nothing else may be newer than glibc 2.28.
    The wheel's name says no newer glibc than the page.
    """
    wheel, library = built
    names = [n for n in _names(wheel) if n.endswith(".so")]
    newer = {
        (Path(name).name, symbol.name)
        for name in names
        for symbol in kernel_abi_check.ObjectFile(str(library.parents[1] / name)).check_manylinux(
            "manylinux_2_28"
        )
        if not (_nvcc() and symbol.version == "2.34")
    }
    assert not newer
    tag = re.fullmatch(r"fastasr-0\.1\.0-py3-none-manylinux_2_(\d+)_\w+\.whl", wheel.name)
    assert tag
    with_cuda = _nvcc() and "aarch64" not in wheel.name
    assert int(tag[1]) <= _promised_glibc()[with_cuda]
    assert library.stat().st_size < 25e6


@pytest.fixture(scope="module")
def dynamic(built) -> str:
    return run("readelf", "--dynamic", "--wide", built[1])


def test_the_library_links_torch_and_the_system_alone(dynamic):
    needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\.so", dynamic))
    assert {"libtorch", "libtorch_cpu", "libc10"} <= needed
    allowed = {
        "libtorch",
        "libtorch_cpu",
        "libc10",
        "libstdc++",
        "libm",
        "libgcc_s",
        "libc",
        "ld-linux-x86-64",
    }
    allowed |= {"ld-linux-aarch64", "libpthread", "libdl", "librt"}
    # neither a second OpenMP runtime nor a CUDA one
    assert needed <= allowed


def test_the_library_looks_nowhere_for_libraries(dynamic):
    assert not re.findall(r"\((?:RPATH|RUNPATH)\).*", dynamic)


def test_the_library_exports_nothing(built):
    assert run("nm", "--dynamic", "--defined-only", built[1]).strip() == ""


def test_the_library_knows_no_python(built):
    symbols = run("nm", "--dynamic", "--undefined-only", built[1])
    assert not re.findall(r"\b_?Py[A-Z_]\w+", symbols)


def test_the_library_uses_the_stable_abi_alone(built):
    symbols = run("nm", "--dynamic", "--undefined-only", "--demangle", built[1])
    names = [line.split(maxsplit=1)[-1] for line in symbols.splitlines()]
    assert [n for n in names if n.startswith(("aoti_torch_", "torch_"))], "the registration shims are used"
    assert not [n for n in names if re.match(r"(at|c10|torch|caffe2|pybind11)::", n)]
    assert not [n for n in names if n.startswith(("GOMP_", "omp_", "cuda", "__cuda"))]


INCLUDE = re.compile(r'^\s*#\s*include\s*([<"][^>"]+[>"])', re.MULTILINE)


def test_bindings_include_the_stable_headers_alone():
    seen = 0
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix not in (".cpp", ".h", ".cu", ".cuh"):
            continue
        for name in INCLUDE.findall(path.read_text()):
            inner = name.strip('<>"')
            library = inner.split("/", 1)[0]
            if library in ("torch", "ATen", "c10", "caffe2"):
                seen += 1
                assert inner.startswith(("torch/csrc/stable/", "torch/headeronly/")), f"{path}: {name}"
                assert "bindings" in path.parts, f"{path}: only csrc/bindings may know torch, includes {name}"
            if library == "pybind11":
                assert path.name == "build_info.cpp", f"{path}: {name}"
    assert seen > 3


def test_every_architecture_is_compiled_where_nvcc_is(installed):
    architectures = installed.python(
        "from fastasr.ops import _dispatch; print(_dispatch.native_build_info()['cuda_architectures'])"
    ).strip()
    wanted = re.search(r'FASTASR_CUDA_ARCHITECTURES "([^"]+)"', (ROOT / "CMakeLists.txt").read_text())[1]
    assert architectures == (wanted.replace(";", ",") if _nvcc() else "None")


CMAKE = """#!/bin/sh
for argument; do case $argument in
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=*) folder=${argument#*=} ;;
  -DFASTASR_MODULE_FILE=*) file=${argument#*=} ;;
esac; done
[ -z "$file" ] || { mkdir -p "$folder"; echo library > "$folder/libfastasr.so"; echo module > "$folder/$file"; }
"""


def test_what_is_built_in_place_lies_beside_the_sources(tmp_path):
    """A stand-in for CMake writes the two files."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("fastasr", "kernels", "benchmarks"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/cmake").write_text(CMAKE)
    (tmp_path / "bin/cmake").chmod(0o755)
    (tmp_path / "fastasr/libfastasr.so").write_text("an older library")
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tmp_path, PATH=path)
    assert (tmp_path / "fastasr/libfastasr.so").read_text() == "library\n"
    (module,) = (tmp_path / "fastasr").glob("_build_info.*")
    assert module.read_text() == "module\n"
