# SPDX-License-Identifier: Apache-2.0
"""How many threads compute each number of a kernel's loops, read from the layouts in Triton's GPU dialect.

A tile that warps cover more than once is computed more than once: Triton puts all warps of two chained products along
the rows, so that 64 rows with 8 warps, of 16 rows each, do all work twice, with its exponentials.
"""

import re
from math import prod

KINDS = {"tt.dot": "dot", "ttng.warp_group_dot": "dot", "math.exp2": "exp", "math.exp": "exp"}
LAYOUT = r"#\w+\.\w+<\{.*?\}>|#\w+"


def _numbers(layout: str, name: str) -> list[int]:
    found = re.search(rf"{name} = \[([\d, ]*)\]", layout)
    return [int(n) for n in found[1].split(",")] if found and found[1].strip() else []


def _copies(layout: str, shape: list[int], known: dict[str, str]) -> float:
    """Returns how many threads hold each element. Registers of one thread that repeat are merged and do not count."""
    layout = known.get(layout, layout)
    kind = layout.partition("<")[0].rpartition(".")[2]
    if kind == "linear":
        zeros = 0
        for place in ("lane", "warp"):
            bases = re.search(place + r" = \[((?:\[[^\]]*\],? ?)*)\]", layout)[1]
            zeros += sum(not any(map(int, b.split(","))) for b in re.findall(r"\[([^\]]*)\]", bases))
        return 2.0**zeros
    warps = _numbers(layout, "warpsPerCTA")
    if kind == "nvidia_mma":
        tile = [*[1] * (len(shape) - 2), 16, _numbers(layout, "instrShape")[1]]
        return prod(max(1, w * t // s) if t <= s else w for w, t, s in zip(warps, tile, shape, strict=True))
    if kind == "blocked":
        held, lanes = _numbers(layout, "sizePerThread"), _numbers(layout, "threadsPerWarp")
        each = zip(held, lanes, warps, shape, strict=True)
        return prod(max(1.0, n * w / (size // min(h, size))) for h, n, w, size in each)
    if kind == "slice":
        dim = int(re.search(r"dim = (\d+)", layout)[1])
        return _copies(re.search(rf"parent = ({LAYOUT})", layout)[1], [*shape[:dim], 1, *shape[dim:]], known)
    return 1.0  # operands of products lie where the instructions want them


def repeated(ttgir: str) -> float:
    """Returns the work of products and of exponentials over the least possible, in the worst of a kernel's loops with
    products. It is 1 where nothing is computed twice.
    """
    known = dict(re.findall(r"^(#\w+) = (#\w+\.\w+<.*>)$", ttgir, flags=re.MULTILINE))
    blocks, records = [], []
    for line in ttgir.splitlines():
        line = re.sub(r" loc\(.*$", "", line.strip())
        name = re.match(r"(?:%[\w:]+(?:, %[\w:]+)* = )?\"?([a-z]+\.\w+)", line)
        name = name[1] if name else ""
        if line.startswith("}") and blocks:
            blocks.pop()
        if line.endswith("{"):
            loop = name in ("scf.for", "scf.while")
            blocks.append({"dot": [0, 0.0], "exp": [0, 0.0]} if loop else None)
            records += [blocks[-1]] * loop
            continue
        loop = next((block for block in reversed(blocks) if block is not None), None)
        kind = "exp" if "ex2.approx" in line else KINDS.get(name)
        types = line.split(" : ", 1)[-1]
        tensors = re.findall(rf"tensor<((?:\d+x)+)[^,<>]+, ({LAYOUT})>", types)
        if loop is None or kind is None or not tensors:
            continue
        shape = [int(n) for n in tensors[-1][0].split("x") if n]
        if len(shape) < 2:  # rows and columns are held by many threads by design
            continue
        inner = re.search(r"(?:tensor|memdesc)<\d+x(\d+)x", types) if kind == "dot" else None
        work = prod(shape) * (int(inner[1]) if inner else 1)
        loop[kind][0] += work
        loop[kind][1] += work * _copies(tensors[-1][1], shape, known)
    loops = [loop.values() for loop in records if loop["dot"][0]]
    return max((round(done / work, 2) for loop in loops for work, done in loop if work), default=1.0)
