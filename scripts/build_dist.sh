#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# build_dist.sh PYTHON [aarch64]: builds build/dist/*.tar.gz from the sources, and build/dist/*.whl from it alone.
# auditwheel names the oldest system that the wheel runs on: manylinux_2_28 without CUDA code, manylinux_2_34 with it.
# With aarch64 both go to build/dist-aarch64, and the wheel is for Linux on aarch64: Debian's cross compiler builds
# it, without CUDA code, against the libraries of torch's wheel for aarch64, which pip downloads once.
# build/source holds the unpacked archive and keeps what was compiled: files have their own dates, so a second run
# compiles what has changed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "$1") || { echo "build_dist.sh: no such Python: $1" >&2; exit 1; }
python=$(realpath -s "$python") machine=${2:-}
dist=$PWD/build/dist${machine:+-$machine}
mkdir -p build
exec 9>build/.dist.lock
flock 9
if [[ $machine ]]; then
  torch=$PWD/build/torch-$machine
  if [[ ! -e $torch/torch/lib ]]; then
    version=$("$python" -c 'import torch; print(torch.__version__.partition("+")[0])')
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --platform "manylinux_2_28_$machine" \
      --dest "$torch" "torch==$version"
    "$python" - "$torch" <<'PY'
import pathlib
import sys
import zipfile

(wheel,) = pathlib.Path(sys.argv[1]).glob("*.whl")
wanted = ("torch/include/", "torch/lib/libc10.so", "torch/lib/libtorch.so", "torch/lib/libtorch_cpu.so")
with zipfile.ZipFile(wheel) as archive:
    archive.extractall(wheel.parent, [name for name in archive.namelist() if name.startswith(wanted)])
wheel.unlink()
PY
  fi
  # setuptools asks for the last
  export CXX=$machine-linux-gnu-g++ CMAKE_TOOLCHAIN_FILE=$PWD/build/source/scripts/$machine.cmake FASTASR_CUDA=0 \
    CMAKE_ARGS="${CMAKE_ARGS:-} -DFASTASR_TORCH=$torch/torch" _PYTHON_HOST_PLATFORM=linux-$machine
fi
rm -rf "$dist"
"$python" -m build --sdist --no-isolation --outdir "$dist" . >build/sdist.log 2>&1 || {
  cat build/sdist.log >&2
  exit 1
}
mkdir -p build/source
find build/source -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
tar -xzf "$dist"/*.tar.gz -C build/source --strip-components=1
# setuptools would leave files of the last wheel in this one.
rm -rf build/source/build/{lib,bdist}* build/source/build/wheel
cd build/source
{
  "$python" -m build --wheel --no-isolation --outdir build/wheel .
  if ls build/wheel/*-linux_*.whl; then  # not the pure wheel
    PATH=$(dirname "$python"):$PATH "$python" -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w "$dist" build/wheel/*.whl
  else
    mv build/wheel/*.whl "$dist"
  fi
} >../wheel.log 2>&1 || {
  cat ../wheel.log >&2
  exit 1
}
