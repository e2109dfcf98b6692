#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# python_headers.sh PYTHON FOLDER: makes sure that the native library can be compiled against PYTHON.
# Where Python.h is missing (Debian's python3 without python3-dev), takes it from the distribution's package into
# FOLDER, without root, and prints the environment that points the build there.
set -euo pipefail
python=$1 folder=$2

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[[ -e "$include/Python.h" ]] && exit
headers="$folder/usr/include"
if [[ ! -e "$headers/python$version/Python.h" ]]; then
  mkdir -p "$folder"
  folder=$(cd "$folder" && pwd) headers="$folder/usr/include"
  if ! (cd "$folder" && apt-get download -qq "libpython$version-dev" && dpkg -x libpython"$version"-dev_*.deb .) >&2; then
    echo "Python.h is missing and could not be downloaded: install python$version-dev" >&2
    exit 1
  fi
fi
headers=$(cd "$headers" && pwd)
echo "export CMAKE_ARGS='-DPython_INCLUDE_DIR=$headers/python$version' CXXFLAGS='-I$headers' CUDAFLAGS='-I$headers'"
