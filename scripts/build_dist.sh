#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# build_dist.sh PYTHON: builds build/dist/*.tar.gz from the sources and build/dist/*.whl from that alone.
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
rm -rf build/source/build/lib* build/source/build/bdist*
cd build/source
"$python" -m build --wheel --no-isolation --outdir ../dist . >../wheel.log 2>&1 || {
  cat ../wheel.log >&2
  exit 1
}
