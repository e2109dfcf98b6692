#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# cpp_tests.sh FOLDER SANITIZERS [SETS]: builds csrc/tests in FOLDER and runs them. SANITIZERS: "", address,undefined or
# thread. SETS: instruction sets as in CMakeLists.txt ("portable;avx2", for example) or "native", the widest that this
# machine runs; all by default. What has passed on this machine with the same files, compiler and processor is not built
# again (CI_FULL=1 does); of tests that are built already a tenth runs. OP=<op> runs the files that test one op.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1 sanitizers=$2 sets=${3:-}
jobs=$(nproc 2>/dev/null || echo 2)
mkdir -p "$folder"
select=()
if [[ -n ${OP:-} ]]; then
  for file in csrc/tests/*.cpp; do
    name=$(basename "$file" .cpp)
    [[ $OP != *"$name"* && $name != *"$OP"* ]] && ! grep -q "TEST_CASE(\"$OP" "$file" || select+=("$name")
  done
  select=(-R "\\.($(IFS='|' && echo "${select[*]:-none}"))\$")
fi
run() { ctest --test-dir "$folder" --output-on-failure -j "$jobs" "$@"; }

state=$({
  echo "$sanitizers $sets"
  "${CXX:-c++}" --version
  grep -m1 ^flags /proc/cpuinfo || uname -m
  find csrc CMakeLists.txt scripts/cpp_tests.sh -type f -print0 | sort -z | xargs -0 sha256sum
} | sha256sum | cut -c1-32)
passed=${XDG_CACHE_HOME:-$HOME/.cache}/fastasr/cpp-tests/$state
if [[ -e $passed && -z ${OP:-} && ${CI_FULL:-0} != 1 ]]; then
  echo "C++ tests: passed before with these files"
  [[ $(cat "$folder/state" 2>/dev/null) != "$state" ]] || run -I "$((${SEED:-$RANDOM} % 10 + 1)),,10"
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

cmake -S . -B "$folder" "${options[@]}" >"$folder/configure.log" 2>&1 || {
  cat "$folder/configure.log" >&2
  exit 1
}
cmake --build "$folder" -j "$jobs"
run "${select[@]}"
if [[ -z ${OP:-} ]]; then
  echo "$state" >"$folder/state"
  mkdir -p "$(dirname "$passed")" && touch "$passed"
fi
