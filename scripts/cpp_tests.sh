#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# cpp_tests.sh FOLDER SANITIZERS [SETS]: builds csrc/tests in FOLDER and runs them. SANITIZERS: "", address,undefined or
# thread. SETS: instruction sets as in CMakeLists.txt ("portable;avx2", for example) or "native", the widest that this
# machine runs; all by default. A file of tests that has passed on this machine with the same files, compiler and
# processor is skipped, but for a tenth of those that are built already (CI_FULL=1 runs all). OP=<op> runs the files that
# test one op. CXX and CMAKE_TOOLCHAIN_FILE in the environment choose another machine, as for CMake.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1 sanitizers=$2 sets=${3:-}
jobs=$(nproc 2>/dev/null || echo 2) RANDOM=${SEED:-$RANDOM}
mkdir -p "$folder"

# What decides a result beside the files that scripts/sources.py finds for each file of tests.
state=$({
  echo "$sanitizers $sets"
  "${CXX:-c++}" --version
  grep -m1 ^flags /proc/cpuinfo || uname -m
  sha256sum CMakeLists.txt csrc/tests/CMakeLists.txt csrc/tests/main.cpp scripts/cpp_tests.sh scripts/sources.py \
    ${CMAKE_TOOLCHAIN_FILE:+"$CMAKE_TOOLCHAIN_FILE"}
} | sha256sum | cut -c1-32)
passed=${XDG_CACHE_HOME:-$HOME/.cache}/fastasr/cpp-tests/$state
hashes=$("$(scripts/find_python.sh)" scripts/sources.py --hashes csrc/tests/*.cpp)
chosen=() drawn=() states=()
while read -r hash file; do
  name=$(basename "$file" .cpp)
  if [[ -n ${OP:-} ]]; then
    [[ $OP != *"$name"* && $name != *"$OP"* ]] && ! grep -q "TEST_CASE(\"$OP" "$file" || chosen+=("$name")
  elif [[ ${CI_FULL:-0} != 1 && -e $passed/$name-$hash ]]; then
    ((RANDOM % 10)) || drawn+=("$name")
  else
    chosen+=("$name") states+=("$passed/$name-$hash")
  fi
done <<<"$hashes"
run() { ctest --test-dir "$folder" --output-on-failure -j "$jobs" -R "\.($(IFS='|' && echo "$*"))\$"; }

if [[ ${#chosen[@]} == 0 ]]; then
  echo "C++ tests: all have passed with these files"
  [[ $(cat "$folder/built" 2>/dev/null) != "$hashes" || ${#drawn[@]} == 0 ]] || run "${drawn[@]}"
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
run "${chosen[@]}" "${drawn[@]}"
echo "$hashes" >"$folder/built"
if ((${#states[@]})); then
  mkdir -p "$passed" && touch "${states[@]}"
fi
