# SPDX-License-Identifier: Apache-2.0
"""Counts what an op's kernels do at a size of training, on an emulated GPU: no GPU is needed.

    python tests/kernels/counts.py bias_norm                          the first size of ON_DEVICE, bf16, sm_90
    python tests/kernels/counts.py bias_norm --case 1 --dtype float32 --architecture 80
    python tests/kernels/counts.py bias_norm --kernel backward        also its loops, and what uses memory badly

A few programs of each launch run; the counts are scaled to all of them. Per launch:

    programs, warps, shared   of the launch, of a program, in bytes
    instructions              in millions, of warps, without moves
    special                   of these, in millions, those of the units for exponentials, roots and quotients
    shared                    millions of wavefronts of shared memory, and what their bytes would need at best
    global                    megabytes in sectors of global memory, and what the bytes themselves are

They are counts of PTX, not times: a bound of a kernel's time is each count over the device's rate, and what a change
saves of the largest of them it saves for certain. The loops are those of the machine code, which ptxas makes of it:
there an exponential may be four instructions, an address three, and a row sixteen loads of one number.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported, which follows
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton

from fastasr import ops
from fastasr.testing.table import Make, floating, samples_of
from tests.kernels.ptx.gpu import emulated_gpu

SPECIAL = {"ex2", "rcp", "rsqrt", "sqrt", "div"}
BAD = 1.3  # times the least that is needed
DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
SHORT = 20  # loops of fewer instructions are not shown


def _loops(cubin: bytes) -> Iterator[Counter]:
    """Returns the instructions of each loop of a kernel's machine code by name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [DISASSEMBLER, "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    labels, names = {}, []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif instruction := re.match(r"\s*/\*\w{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)[^;]*;", line):
            names.append(instruction[1])
            target = re.search(r"\.L_x_\d+", line)
            begin = labels.get(target[0]) if instruction[1] == "BRA" and target else None
            if begin is not None and len(names) - begin >= SHORT:
                yield Counter(names[begin:])


def _launch(launch, trace, cubin: bytes, kernel: str) -> None:
    m = trace.machine
    x, y, z = launch.grid
    scale = x * y * z / m.programs
    kinds = [i.operation[0] for i in m.program.instructions]
    taken = [0 if kind == "mov" else n for kind, n in zip(kinds, trace.counts, strict=True)]
    special = sum(n for kind, n in zip(kinds, trace.counts, strict=True) if kind in SPECIAL)
    waves, sectors = trace.waves.sum(), trace.sectors.sum()
    print(
        f"{launch.name:32} {x * y * z:7} {m.threads // 32:3} {m.shared_size:7} "
        f"{sum(taken) * scale / 1e6:9.2f} {special * scale / 1e6:8.2f} "
        f"{waves * scale / 1e6:8.3f} {trace.least_waves.sum() * scale / 1e6:8.3f} "
        f"{sectors * scale * 32e-6:9.1f} {trace.least_sectors.sum() * scale * 32e-6:9.1f}"
    )
    if kernel and kernel in launch.name:
        for loop in _loops(cubin):
            most = ", ".join(f"{name} {count}" for name, count in loop.most_common(24))
            print(f"    loop of {loop.total()} instructions: {most}")
        for place, instruction in enumerate(m.program.instructions):
            for used, least, unit in (
                (trace.waves[place], trace.least_waves[place], "wavefronts"),
                (trace.sectors[place], trace.least_sectors[place], "sectors"),
            ):
                if used > BAD * least:
                    print(f"    {instruction.text[:90]:90} {used / least:5.1f} times the {unit}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op", choices=ops.NAMES, metavar="op")
    parser.add_argument("--case", type=int, default=0, help="which of the op's ON_DEVICE")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--architecture", type=int, default=90)
    parser.add_argument("--programs", type=int, default=8, help="how many programs of a launch run")
    parser.add_argument("--kernel", default="", help="part of a kernel's name")
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    case = samples_of(chosen.op).ON_DEVICE[chosen.case]
    arguments = case.arguments(Make(getattr(torch, chosen.dtype), "cpu"))
    for name in floating(arguments):
        arguments[name].requires_grad_(True)
    with emulated_gpu(capability=divmod(chosen.architecture, 10), sample=chosen.programs) as gpu:
        found = getattr(ops, chosen.op)(**arguments)
        outputs = [t for t in (found if isinstance(found, (tuple, list)) else [found]) if t.requires_grad]
        forward = len(gpu.traces)
        torch.autograd.backward(outputs, [torch.randn_like(t) for t in outputs])
    print(f"{chosen.op} {case.name}, {chosen.dtype}, sm_{chosen.architecture}")
    print(f"{'':32} programs warps shared instructions special   shared    least    global     least")
    for number, (launch, trace, cubin) in enumerate(gpu.traces):
        if number == forward:
            print("backward")
        _launch(launch, trace, cubin, chosen.kernel)


if __name__ == "__main__":
    main()
