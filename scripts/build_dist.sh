#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# build_dist.sh PYTHON: builds build/dist/*.tar.gz from the sources and build/dist/*.whl from that alone. auditwheel names
# the oldest system that the wheel runs on: manylinux_2_28 without CUDA code, this machine's glibc with it.
# build/source holds the unpacked archive and keeps what was compiled: files have their own dates, so a second run
# compiles what has changed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1")
mkdir -p build
exec 9>build/.dist.lock
flock 9
rm -rf build/dist
"$python" -m build --sdist --no-isolation --outdir build/dist . >build/sdist.log 2>&1 || {
  cat build/sdist.log >&2
  exit 1
}
mkdir -p build/source
find build/source -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
tar -xzf build/dist/*.tar.gz -C build/source --strip-components=1
# setuptools leaves in a wheel what it copied for the last one
rm -rf build/source/build/{lib,bdist}* build/source/build/wheel
cd build/source
{
  "$python" -m build --wheel --no-isolation --outdir build/wheel .
  if ls build/wheel/*-linux_*.whl; then  # not the pure wheel
    PATH=$(dirname "$python"):$PATH "$python" -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w ../dist build/wheel/*.whl
  else
    mv build/wheel/*.whl ../dist
  fi
} >../wheel.log 2>&1 || {
  cat ../wheel.log >&2
  exit 1
}
