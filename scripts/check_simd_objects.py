#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""check_simd_objects.py OBJECT...: the objects of one link, in its order.

Objects below a folder ``kernels_SET.dir`` are compiled for an instruction set that a machine may lack. None of their
code may run before that set is chosen, and the linker may merge none of it with code that a lesser machine runs:

- no initialiser that runs when the library is loaded;
- an inline function, a template or a variable of ours that the linker may merge lies in the set's own namespace;
- of any other (the standard library's) the linker keeps the first in link order: that one must be of a set no wider
  than any object that mentions it.
"""

import re
import subprocess
import sys
from collections.abc import Iterator

# The sets of each architecture in ascending order; every machine runs the first.
SETS = (
    ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "avx512_amx"),
    ("neon", "neon_dot", "neon_bf16"),
)
WIDEST = max(map(len, SETS))


def set_of(path: str) -> tuple[int, str]:
    """Returns how wide the set of an object is, and its name."""
    found = re.search(r"kernels_(\w+)\.dir", path)
    return next((sets.index(found[1]), found[1]) for sets in SETS if found[1] in sets) if found else (0, "")


def output(*command: str, text: str = "") -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, input=text).stdout


def demangled(name: str) -> str:
    return output("c++filt", name).strip()


def symbols(paths: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yields (object, name, nm's letter) of the symbols that leave each object."""
    for line in output("nm", "-P", "-g", "-A", *paths).splitlines():
        path, rest = line.split(": ", 1)
        yield path, *rest.split()[:2]


def problems(paths: list[str]) -> list[str]:
    found, first, least, ours = [], {}, {}, {}
    sets = {path: set_of(path) for path in paths}
    sections = output("readelf", "-SW", *paths).split("\nFile: ")
    for path in (
        section.split("\n", 1)[0] for section in sections if re.search(r"\.(init_array|ctors)\b", section)
    ):
        if sets[path.removeprefix("File: ")][0]:
            found.append(f"{path}: runs code when the library is loaded")
    for path, name, letter in symbols(paths):
        level, name_of_set = sets[path]
        if letter in "WVu":
            first.setdefault(name, (level, path))
            if level and "7fastasr" in name and f"{len(name_of_set)}{name_of_set}" not in name:
                ours.setdefault(name, path)
        if letter in "WVuU" and level < least.get(name, (WIDEST, ""))[0]:
            least[name] = (level, path)
    for name, path in ours.items():
        found.append(f"{path}: {demangled(name)} is outside the instruction set's namespace")
    for name, (level, path) in first.items():
        if level > least[name][0]:
            found.append(f"{path}: {demangled(name)} would serve {least[name][1]}")
    return found


if __name__ == "__main__":
    # CMake lists precompiled headers among a target's objects
    if result := problems([path for path in sys.argv[1:] if path.endswith(".o")]):
        sys.exit("\n".join(result))
