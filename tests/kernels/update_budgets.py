# SPDX-License-Identifier: Apache-2.0
"""Compiles kernel configurations ahead of time, measures what the compiler made of them, and writes budgets.toml.

    python tests/kernels/update_budgets.py             rows whose hash has changed, and new ones
    python tests/kernels/update_budgets.py --all       every row of this Triton's section
    python tests/kernels/update_budgets.py --op swoosh only the configurations of an op; other rows stay
    python tests/kernels/update_budgets.py --json      prints hashes, and the measures of changed rows and of a random
                                                       twentieth (--seed), or of all rows (--all); without a section
                                                       for this Triton, of the twentieth alone

No GPU is needed: Triton's wheel ships ptxas and cuobjdump. Measured per configuration:

    registers      per thread            spills        bytes of stack or local memory per thread
    shared         bytes per program     instructions  of the whole program, in SASS
    wide, narrow   global loads and stores of 128 bits, and of fewer, in PTX
    repeated       how often threads compute a product or an exponential of the worst loop, where it is more than once

The hash is that of all that decides them: the kernel's code and that of what it calls, without comments, its signature,
constants and options, the architecture and Triton's version.
"""

import argparse
import ast
import hashlib
import json
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import tomllib
import warnings
from functools import cache
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported, which follows

import triton
from configurations import Configuration, configurations
from repetition import repeated
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from fastasr.kernels._launch import PRECISE

BUDGETS = Path(__file__).with_name("budgets.toml")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MEASURES = ("registers", "spills", "shared", "wide", "narrow", "instructions", "repeated")


@cache
def _strip_comments() -> None:
    """Leaves comments and places in their files out of the hashes of kernels."""
    modules = [module for name, module in sys.modules.items() if name.startswith("fastasr.kernels.")]
    for function in {f for module in modules for f in vars(module).values() if isinstance(f, JITFunction)}:
        function._unsafe_update_src(ast.unparse(ast.parse(function.src)))
        function.starting_line_number = 1


def _source(configuration: Configuration) -> tuple[ASTSource, dict]:
    """Returns the kernel as the compiler takes it, with every pointer aligned to 16 bytes, and its options."""
    names = configuration.kernel.arg_names
    signature = {
        name: "constexpr"
        if name in configuration.constants
        else "*" + configuration.types[name]
        if name in configuration.types
        else "fp32"
        if name in configuration.floats
        else "i32"
        for name in names
    }
    aligned = {n for n in names if signature[n].startswith("*") or n in configuration.divisible}
    source = ASTSource(
        configuration.kernel,
        signature,
        constexprs={(names.index(n),): v for n, v in configuration.constants.items() if n in names},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in sorted(aligned)},
    )
    options = {"num_warps": configuration.warps, "num_stages": configuration.stages}
    options |= {name: value for name, value in configuration.constants.items() if name in PRECISE}
    return source, options | {"maxnreg": configuration.most_registers}


def fingerprint(configuration: Configuration, architecture: int) -> str:
    """Returns the hash of all that decides what the compiler makes of the configuration."""
    _strip_comments()
    source, options = _source(configuration)
    parts = source.hash(), configuration.kernel.arg_names, options, architecture, triton.__version__
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def compiled(configuration: Configuration, architecture: int):
    """Compiles the kernel for ``sm_<architecture>``."""
    source, options = _source(configuration)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=PRECISE | options)


def _resource_usage(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _instructions(cubin: bytes) -> int:
    """Counts instructions in the ELF file's .text sections: 16 bytes each, opcode in the low 12 bits, padding left out.

    The count is that of cuobjdump -sass, which takes a second per kernel.
    """
    table, size, count, names = struct.unpack_from("<Q10xHHH", cubin, 0x28)
    sections = [struct.unpack_from("<II8x8xQQ", cubin, table + size * i) for i in range(count)]
    labels = sections[names][2]
    nop, total = 0x918, 0
    for label, _, offset, length in sections:
        if cubin[labels + label :].startswith(b".text."):
            words = struct.unpack_from(f"<{length // 8}Q", cubin, offset)[::2]
            total += sum(word & 0xFFF != nop for word in words)
    return total


def measure(configuration: Configuration, architecture: int) -> dict[str, int]:
    code = compiled(configuration, architecture)
    usage = _resource_usage(code.asm["cubin"])
    registers, stack, local = map(
        int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups()
    )
    widths = [
        int(lanes or 1) * int(bits)
        for lanes, bits in re.findall(
            r"(?:ld|st)\.global(?:\.[a-z][\w:]*?)*?(?:\.v(\d))?\.b(\d+)", code.asm["ptx"]
        )
    ]
    return {
        "registers": registers,
        "spills": stack + local,
        "shared": code.metadata.shared,
        "wide": sum(width >= 128 for width in widths),
        "narrow": sum(width < 128 for width in widths),
        "instructions": _instructions(code.asm["cubin"]),
    } | ({"repeated": work} if (work := repeated(code.asm["ttgir"])) > 1 else {})


def triton_series() -> str:
    return ".".join(triton.__version__.split(".")[:2])


def compilations() -> dict[str, tuple[Configuration, int]]:
    """Returns (configuration, architecture) by "name, sm_NN"."""
    return {
        f"{configuration.name}, sm_{architecture}": (configuration, architecture)
        for configuration in configurations()
        for architecture in configuration.architectures
    }


def budgets() -> dict[str, dict]:
    """Returns the rows of this Triton's section."""
    return tomllib.loads(BUDGETS.read_text()).get(f"triton {triton_series()}", {})


def write(measured: dict[str, dict]) -> None:
    """Puts the measures into this Triton's section of budgets.toml, and drops the rows of configurations that no longer
    exist; the head of the file and other sections stay.
    """
    section = f'["triton {triton_series()}"]'
    known = budgets() | measured
    rows = {name: known[name] for name in compilations() if name in known}
    width = max(map(len, rows)) + 2
    lines = [section]
    for name, values in rows.items():
        cells = [f"{key} = {values[key]:>{4 if key != 'spills' else 1}}" for key in MEASURES if key in values]
        cells += [f'hash = "{values["hash"]}"'] if "hash" in values else []
        lines.append(f"{json.dumps(name):<{width}} = {{ {', '.join(cells)} }}")
    head, *sections = re.split(r"^(?=\[)", BUDGETS.read_text(), flags=re.MULTILINE)
    kept = [s.strip() for s in sections if not s.startswith(section)]
    BUDGETS.write_text("\n\n".join([head.strip(), *sorted([*kept, "\n".join(lines)])]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="rows of known hash too")
    parser.add_argument("--op", metavar="NAME", help="only configurations whose name begins with this word")
    parser.add_argument("--json", action="store_true", help="print instead of writing budgets.toml")
    parser.add_argument("--seed", help="with --json: compile a twentieth of the rows of known hash too")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    chosen = {
        name: (fingerprint(*compilation), compilation)
        for name, compilation in compilations().items()
        if arguments.op in (None, name.split()[0])
    }
    if not chosen:
        parser.error(f"no configuration of {arguments.op}")
    known, draw = budgets(), random.Random(arguments.seed)
    measured = {}
    for name, (hash_, compilation) in chosen.items():
        sampled = arguments.seed is not None and draw.random() < 0.05
        changed = known.get(name, {}).get("hash") != hash_ and (known or not arguments.json)
        if arguments.all or sampled or changed:
            measured[name] = measure(*compilation) | {"hash": hash_}
    if arguments.json:
        hashes = {name: hash_ for name, (hash_, _) in chosen.items()}
        json.dump({"triton": triton_series(), "hashes": hashes, "measured": measured}, sys.stdout)
    else:
        write(measured)
        print(f"{len(measured)} of {len(chosen)} configurations measured for {BUDGETS.name}")


if __name__ == "__main__":
    main()
