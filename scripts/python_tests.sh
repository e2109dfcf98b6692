#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# python_tests.sh PYTHON MARKER [pytest arguments]
# The Python suite in two halves side by side: the tests of the GPU kernels (interpreted, emulated, compiled), which keep one
# core busy for as long as all others together keep another.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 marker=$2
shift 2
kernels=(tests/kernels tests/ops/test_contract_interpreted.py)
log=$(mktemp)
"$python" -m pytest -p no:cacheprovider -m "$marker" "${kernels[@]}" "$@" >"$log" 2>&1 &
beside=$!
trap 'kill "$beside" 2>/dev/null || true; rm -f "$log"' EXIT

others=0 gpu=0
"$python" -m pytest -m "$marker" "${kernels[@]/#/--ignore=}" "$@" || others=$?
wait "$beside" || gpu=$?
echo "== tests of the GPU kernels"
cat "$log"
# 5: nothing was selected, as with -k
if ((others == 5 && gpu == 5)); then exit 5; fi
if ((others != 0 && others != 5)); then exit "$others"; fi
if ((gpu != 0 && gpu != 5)); then exit "$gpu"; fi
