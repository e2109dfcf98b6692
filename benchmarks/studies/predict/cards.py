# SPDX-License-Identifier: Apache-2.0
"""The GPUs that times are predicted for.

Multiprocessors, clocks, memory and peaks are those of NVIDIA's publications: the white papers of the A100, of the H100
(SXM5) and of Ada (GeForce RTX 4090: 1008 GB/s, 165 TFLOP/s of bfloat16, float64 at 1/64 of float32), and the data
sheets of the H200 (4.8 TB/s) and of the HGX B200 (8 TB/s, 2250 TFLOP/s of bfloat16 without sparsity; the clock is that
of this peak). Latencies and the rates of second-level caches are rounded from published microbenchmarks; those of the
B200 are estimates, from the H100's.
"""

from dataclasses import dataclass

KIB = 1 << 10


@dataclass(frozen=True)
class Card:
    """A GPU. Cycles are those in which one of a multiprocessor's four schedulers cannot give a pipe a second warp."""

    name: str
    capability: int
    processors: int
    ghz: float
    memory: float  # GB/s that a copy reaches: 87 % of the data sheet's
    cache: float  # GB/s from the second-level cache
    shared: int  # bytes of shared memory for the programs of a multiprocessor
    warps: int  # of a multiprocessor
    programs: int  # of a multiprocessor
    peak: float  # TFLOP/s of dense products in bfloat16, with sums in float32
    fma: float  # cycles of a float32 multiply-add
    double: float  # cycles of a float64 multiply-add
    product: float  # cycles of mma.m16n8k16, which every generation has
    wide_product: float = 0  # FLOPs per cycle and multiprocessor of wgmma or tcgen05
    latency: int = 230  # cycles of a load that the second-level cache answers


CARDS = (
    Card("A100", 80, 108, 1.41, 1774, 3500, 164 * KIB, 64, 32, 312, 2, 4, 8),
    Card("RTX 4090", 89, 128, 2.52, 877, 5000, 100 * KIB, 48, 24, 165, 1, 64, 32),
    Card("H100", 90, 132, 1.75, 2915, 5500, 228 * KIB, 64, 32, 989, 1, 2, 6.5, 4096, 260),
    Card("H200", 90, 132, 1.75, 4176, 5500, 228 * KIB, 64, 32, 989, 1, 2, 6.5, 4096, 260),
    Card("B200", 100, 148, 1.85, 6960, 10000, 228 * KIB, 64, 32, 2250, 1, 2, 8, 8192, 280),
)
