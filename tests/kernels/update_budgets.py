# SPDX-License-Identifier: Apache-2.0
"""Compiles kernel configurations ahead of time, measures what the compiler made of them, and writes budgets.toml.

    python tests/kernels/update_budgets.py               configurations whose hash has changed, and new ones
    python tests/kernels/update_budgets.py --all         every configuration
    python tests/kernels/update_budgets.py --op swoosh   those of one op
    python tests/kernels/update_budgets.py --also FOLDER with the Triton in FOLDER too, for a section of its own
                                                         (pip install --no-deps --target FOLDER triton==3.6.0)
    python tests/kernels/update_budgets.py --json        prints hashes, and the measures of changed configurations and,
                                                         on one architecture, of a random twentieth (--seed), or of
                                                         all (--all); without a section for this Triton, of the
                                                         twentieth alone

No GPU is needed: Triton's wheel ships ptxas and cuobjdump. A compilation takes about 0.7 s, and all of them for one
Triton 40 minutes. A run that is stopped loses the last few configurations at most: the first command goes on from
there. Measured per configuration and architecture:

    registers      per thread            spills        bytes of stack or local memory per thread
    shared         bytes per program     instructions  of the whole program, in SASS
    wide, narrow   global loads and stores of 128 bits, and of fewer, in PTX
    repeated       how often threads compute a product or an exponential of the worst loop

The hash is that of all that decides them on any architecture: the kernel's code and that of what it calls, without
comments, its signature, constants and options, and Triton's version.
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
import warnings
from functools import cache
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported, which follows

import budgets
import triton
from configurations import configurations
from configurations.configuration import Configuration
from repetition import repeated
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from fastasr.kernels._launch import PRECISE

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KEPT = 10  # configurations between two times that the file is written
Compilations = dict[int, Configuration]  # those of one name, by architecture


@cache
def _strip_comments() -> None:
    """Leaves comments and places in their files out of the hashes of kernels."""
    modules = [module for name, module in sys.modules.items() if name.startswith("fastasr.kernels.")]
    for function in {f for module in modules for f in vars(module).values() if isinstance(f, JITFunction)}:
        function._unsafe_update_src(ast.unparse(ast.parse(function.src)))
        function.starting_line_number = 1


def _source(configuration: Configuration) -> tuple[ASTSource, dict]:
    """Returns the kernel as the compiler takes it, and its options. All pointers are aligned to 16 bytes, but it hears
    nothing of the alignment of those for which the kernel says so."""
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
    divisible = set(configuration.divisible) - configuration.constants.keys()
    unknown = {p.name for p in configuration.kernel.params if p.do_not_specialize_on_alignment}
    aligned = {n for n in names if n in divisible or (signature[n].startswith("*") and n not in unknown)}
    source = ASTSource(
        configuration.kernel,
        signature,
        constexprs={(names.index(n),): v for n, v in configuration.constants.items() if n in names},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in sorted(aligned)},
    )
    given = {"num_stages": 3} | configuration.constants  # Triton's own choice
    options = {name: given[name] for name in ("num_warps", "num_stages", *PRECISE) if name in given}
    return source, options | {"maxnreg": given.get("maxnreg")}


def fingerprint(compilations: Compilations) -> str:
    """Returns the hash of all that decides what the compiler makes of the configurations."""
    _strip_comments()
    sources = {id(configuration): _source(configuration) for configuration in compilations.values()}
    texts = {key: (source.hash(), source.fn.arg_names, options) for key, (source, options) in sources.items()}
    parts = triton.__version__, [(place, texts[id(own)]) for place, own in compilations.items()]
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
        "repeated": repeated(code.asm["ttgir"]),
    }


def section() -> str:
    """Returns the name of this Triton's section of budgets.toml."""
    return f"triton {'.'.join(triton.__version__.split('.')[:2])}"


def compilations() -> dict[str, Compilations]:
    """Returns the configurations of each name, by architecture."""
    found = {}
    for configuration in configurations():
        of_name = found.setdefault(configuration.name, {})
        of_name |= dict.fromkeys(configuration.architectures, configuration)
    return {name: dict(sorted(found[name].items())) for name in sorted(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="configurations of known hash too")
    parser.add_argument("--op", metavar="NAME", help="only configurations whose name begins with this word")
    parser.add_argument(
        "--also", metavar="FOLDER", help="then do the same with the Triton that lies in FOLDER"
    )
    parser.add_argument("--json", action="store_true", help="print instead of writing budgets.toml")
    parser.add_argument(
        "--seed", help="with --json: compile a twentieth of the others, each for one architecture"
    )
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    chosen = {
        name: (fingerprint(of_name), of_name)
        for name, of_name in compilations().items()
        if arguments.op in (None, name.split()[0])
    }
    if not chosen:
        parser.error(f"no configuration of {arguments.op}")
    known, draw = budgets.read().get(section(), {}), random.Random(arguments.seed)
    names, measured = sorted(compilations()), {}

    def write() -> None:
        rows = known | measured
        budgets.write(section(), {name: rows[name] for name in names if name in rows})

    for name, (hash_, of_name) in chosen.items():
        changed = known.get(name, {}).get("hash") != hash_ and (known or not arguments.json)
        architectures = list(of_name) if arguments.all or changed else []
        if arguments.seed is not None and not architectures and draw.random() < 0.05:
            architectures = [draw.choice(list(of_name))]
        if architectures:
            measured[name] = {"hash": hash_} | {
                place: measure(of_name[place], place) for place in architectures
            }
            if not arguments.json and len(measured) % KEPT == 0:
                write()
    if arguments.json:
        hashes = {name: hash_ for name, (hash_, _) in chosen.items()}
        json.dump({"section": section(), "hashes": hashes, "measured": measured}, sys.stdout)
        return
    write()
    print(f"{len(measured)} of {len(chosen)} configurations measured with Triton {triton.__version__}")
    if arguments.also:
        place = sys.argv.index("--also")
        again = [sys.executable, *sys.argv[:place], *sys.argv[place + 2 :]]
        subprocess.run(again, env=os.environ | {"PYTHONPATH": arguments.also}, check=True)


if __name__ == "__main__":
    main()
