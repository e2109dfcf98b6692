#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# cpp_tests.sh FOLDER SANITIZERS [PATHS]: builds csrc/tests in FOLDER and runs them. SANITIZERS: "", address,undefined or
# thread. PATHS: code paths as in csrc/tests/CMakeLists.txt, "dispatch;avx2" for example, or "widest", the widest that this
# machine runs; default all.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1 sanitizers=$2 paths=${3:-dispatch;baseline;avx2;avx512}
if [[ $paths == widest ]]; then
  paths=dispatch # its loader picks
  for flag in avx512f avx2; do
    if grep -qw "$flag" /proc/cpuinfo 2>/dev/null; then
      paths=${flag%f}
      break
    fi
  done
fi
jobs=$(nproc 2>/dev/null || echo 2)

mkdir -p "$folder"
cmake -S . -B "$folder" -DFASTASR_TESTS=ON "-DFASTASR_SANITIZE=$sanitizers" "-DFASTASR_TEST_PATHS=$paths" >"$folder/configure.log" 2>&1 || {
  cat "$folder/configure.log" >&2
  exit 1
}
cmake --build "$folder" -j "$jobs"
ctest --test-dir "$folder" --output-on-failure -j "$jobs"
