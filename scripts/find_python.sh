#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Prints the Python (3.11 or newer, with venv) that .venv is made from. PYTHON=... asks for one.
set -euo pipefail

usable() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
  if command -v "$candidate" >/dev/null && usable "$candidate"; then
    # the interpreter itself: a version manager's shim may change its mind in another folder
    "$candidate" -c 'import sys; print(sys.executable)'
    exit
  fi
  if [[ -n "${PYTHON:-}" ]]; then
    echo "PYTHON=$PYTHON is not a Python >= 3.11 with the venv module" >&2
    exit 1
  fi
done
echo "no Python >= 3.11 with the venv module was found (on Debian: apt-get install python3 python3-venv)" >&2
exit 1
