#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# python_tests.sh PYTHON MARKER [pytest arguments]
# The Python suite in parts, two at a time and the long ones first: the tests of the GPU kernels (interpreted, emulated,
# compiled) keep one core busy for as long as all others together. Each part's output is printed when it ends.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 marker=$2
shift 2
interpreted=tests/ops/test_contract_interpreted.py
parts=("$interpreted" tests/kernels "tests/ops --ignore=$interpreted" tests/parity tests/swap)
others=()
for folder in tests/*/; do
  case " ${parts[*]} " in
    *" ${folder%/} "*) ;;
    *) others+=("${folder%/}") ;;
  esac
done
parts+=("${others[@]}")

logs=$(mktemp -d)
trap 'jobs -p | xargs -r kill 2>/dev/null || true; rm -rf "$logs"' EXIT

part() { # index, pytest arguments
  local index=$1 code=0 began=$SECONDS
  local -a paths
  read -ra paths <<<"${parts[index]}"
  shift
  "$python" -m pytest -p no:cacheprovider -m "$marker" "${paths[@]}" "$@" >"$logs/$index" 2>&1 || code=$?
  echo "$code" >"$logs/$index.code"
  until mkdir "$logs/printing" 2>/dev/null; do sleep 0.1; done
  echo "== ${paths[*]} ($((SECONDS - began)) s)"
  cat "$logs/$index"
  rmdir "$logs/printing"
}

worker() { # mkdir is how one of the two takes a part
  local index
  for index in "${!parts[@]}"; do
    if mkdir "$logs/$index.taken" 2>/dev/null; then part "$index" "$@"; fi
  done
}

worker "$@" &
worker "$@"
wait

# 5: nothing was selected, as with -k
empty=5 failed=0
for index in "${!parts[@]}"; do
  code=$(<"$logs/$index.code")
  if ((code != 5)); then empty=0; fi
  if ((code != 0 && code != 5)); then failed=$code; fi
done
if ((failed)); then exit "$failed"; fi
exit "$empty"
