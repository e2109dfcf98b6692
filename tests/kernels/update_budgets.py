# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel configuration ahead of time for sm_80 and sm_90 and measures what the compiler made of it.

    python tests/kernels/update_budgets.py             measures, rewrites this Triton's section of budgets.toml
    python tests/kernels/update_budgets.py --op swoosh only the configurations of an op; other rows stay
    python tests/kernels/update_budgets.py --json 80   measures, prints JSON

No GPU is needed: Triton's wheel ships ptxas and cuobjdump. Measured per configuration:

    registers      per thread            spills        bytes of stack or local memory per thread
    shared         bytes per program     instructions  of the whole program, in SASS
    wide, narrow   global loads and stores of 128 bits, and of fewer, in PTX
"""

import argparse
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import tomllib
import warnings
from collections.abc import Sequence
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported, which follows

import triton
from configurations import ARCHITECTURES, Configuration, configurations
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BUDGETS = Path(__file__).with_name("budgets.toml")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MEASURES = ("registers", "spills", "shared", "wide", "narrow", "instructions")


def compiled(configuration: Configuration, architecture: int):
    """Compiles the kernel for ``sm_<architecture>`` with every pointer aligned to 16 bytes."""
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
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    target = GPUTarget("cuda", architecture, 32)
    options = {"num_warps": configuration.warps, "num_stages": configuration.stages}
    options["maxnreg"] = configuration.most_registers
    return triton.compile(source, target=target, options=options)


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
    }


def triton_series() -> str:
    return ".".join(triton.__version__.split(".")[:2])


def compilations() -> dict[str, tuple[Configuration, int]]:
    """Returns (configuration, architecture) by "name, sm_NN"."""
    return {
        f"{configuration.name}, sm_{architecture}": (configuration, architecture)
        for configuration in configurations()
        for architecture in configuration.architectures
    }


def measure_all(only: Sequence[int] = ARCHITECTURES, op: str | None = None) -> dict[str, dict[str, int]]:
    """Measures one op's kernels or all, and returns the measures by "name, sm_NN"."""
    return {
        name: measure(configuration, architecture)
        for name, (configuration, architecture) in compilations().items()
        if architecture in only and (op is None or name.split()[0] == op)
    }


def write(measured: dict[str, dict[str, int]]) -> None:
    """Puts the measures into this Triton's section of budgets.toml, and drops the rows of configurations that no longer
    exist; the head of the file and other sections stay.
    """
    series = f"triton {triton_series()}"
    section = f'["{series}"]'
    known = tomllib.loads(BUDGETS.read_text()).get(series, {}) | measured
    rows = {name: known[name] for name in compilations() if name in known}
    width = max(map(len, rows)) + 2
    lines = [section]
    for name, values in rows.items():
        body = ", ".join(f"{key} = {values[key]:>{4 if key != 'spills' else 1}}" for key in MEASURES)
        lines.append(f"{json.dumps(name):<{width}} = {{ {body} }}")
    head, *sections = re.split(r"^(?=\[)", BUDGETS.read_text(), flags=re.MULTILINE)
    kept = [s.strip() for s in sections if not s.startswith(section)]
    BUDGETS.write_text("\n\n".join([head.strip(), *sorted([*kept, "\n".join(lines)])]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--json",
        type=int,
        nargs="+",
        metavar="NN",
        choices=ARCHITECTURES,
        help="print the measures for these sm_NN instead of writing budgets.toml",
    )
    parser.add_argument(
        "--op", metavar="NAME", help="only the configurations whose name begins with this word"
    )
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    measured = measure_all(arguments.json or ARCHITECTURES, arguments.op)
    if not measured:
        parser.error(f"no configuration of {arguments.op}")
    if arguments.json:
        json.dump({"triton": triton_series(), "measured": measured}, sys.stdout)
    else:
        write(measured)
        print(f"{len(measured)} configurations written to {BUDGETS.name}, section triton {triton_series()}")


if __name__ == "__main__":
    main()
