#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# cpp_tests.sh FOLDER SANITIZERS [SETS]: builds csrc/tests in FOLDER and runs them. SANITIZERS: "", address,undefined or
# thread. SETS: instruction sets as in CMakeLists.txt ("portable;avx2", for example) or "native", the widest that this
# machine runs; all by default. OP=<op> runs the files that test one op. CXX and CMAKE_TOOLCHAIN_FILE in the environment
# choose another machine, as for CMake.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1 sanitizers=$2 sets=${3:-}
jobs=$(nproc 2>/dev/null || echo 2)
mkdir -p "$folder"

chosen=()
for file in csrc/tests/*.cpp; do
  name=$(basename "$file" .cpp)
  [[ -n ${OP:-} && $OP != *"$name"* && $name != *"$OP"* ]] && ! grep -q "TEST_CASE(\"$OP" "$file" || chosen+=("$name")
done
if [[ ${#chosen[@]} == 0 ]]; then
  echo "C++ tests: none of ${OP:-}"
  exit
fi
options=(-DFASTASR_TESTS=ON "-DFASTASR_SANITIZE=$sanitizers")
[[ -z $sets ]] || options+=("-DFASTASR_SETS=$sets")

# doctest's header: where it is not installed, it comes from the distribution's package, without root.
if ! echo "#include <doctest/doctest.h>" | "${CXX:-c++}" -E -x c++ - >/dev/null 2>&1; then
  headers=build/doctest
  if [[ ! -e $headers/usr/include/doctest/doctest.h ]]; then
    mkdir -p "$headers"
    download() { apt-get download -qq doctest-dev; }
    if ! (cd "$headers" && { download || { apt-get update -qq && download; }; } && dpkg -x doctest-dev_*.deb .) >&2; then
      echo "doctest/doctest.h is missing and could not be downloaded: install doctest-dev" >&2
      exit 1
    fi
  fi
  options+=("-DFASTASR_DOCTEST=$PWD/$headers/usr/include")
fi

# Another version of CMake would compile everything again: a first run begins before the environment has one.
cmake=$(sed -n 's/^CMAKE_COMMAND:INTERNAL=//p' "$folder/CMakeCache.txt" 2>/dev/null || true)
[[ -x $cmake ]] || cmake=cmake
"$cmake" -S . -B "$folder" "${options[@]}" >"$folder/configure.log" 2>&1 || {
  cat "$folder/configure.log" >&2
  exit 1
}
"$cmake" --build "$folder" -j "$jobs"
ctest --test-dir "$folder" --output-on-failure -j "$jobs" -R "\.($(IFS='|' && echo "${chosen[*]}"))\$"
