# SPDX-License-Identifier: Apache-2.0
"""One decoding step of ESPnet's MEGA decoder at its default sizes: upstream as shipped, fastasr.

A step extends B hypotheses that share a history length; the states come from the step before, as in a search. The floor
is the longer of two times: copying as many bytes as the weights and the history have, and computing their products at
the rate of the machine's best GEMM.
"""

import copy
from collections.abc import Callable, Iterator

import torch

from fastasr.benchmarks import limits, upstream
from fastasr.benchmarks.harness import Variant
from fastasr.benchmarks.models.unit import COMPILE, FASTASR, FORWARD, UPSTREAM, Run, benchmark, product_limit
from fastasr.benchmarks.rows import Row

NAME = "mega_step"
SIZES = {"default": {"vocab_size": 500}, "tiny": {"vocab_size": 50, "block_size": 64, "linear_size": 96}}
HISTORIES, BATCHES = (0, 50, 200), (1, 4, 10)
QUICK = {"size": "tiny", "histories": (3,), "batches": (2,)}


def cases(histories=HISTORIES, batches=BATCHES) -> list[tuple[str, str, int, int]]:
    """Returns (case, shape, history, batch) of every unit."""
    return [(f"history {h}", f"B={b}", h, b) for b in batches for h in histories]


def decoders(size: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Returns upstream's decoder and fastasr's with the same parameters. Raises ``upstream.MissingUpstream``."""
    from fastasr.models.mega import MEGADecoder

    module = upstream.module("espnet2.asr_transducer.decoder.mega_decoder")
    torch.manual_seed(0)
    theirs = module.MEGADecoder(**SIZES[size]).eval()
    ours = MEGADecoder(**SIZES[size], phantom_first_step=True).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def _states(decoder: torch.nn.Module, batch: int, history: int) -> list[dict[str, torch.Tensor]]:
    """Returns the states of ``batch`` hypotheses after ``history`` labels, less the last one, which the measured step
    adds.
    """
    rows = max(1, history)  # The first row is a key and a value of zero.
    sizes = {"prev_key": decoder.mega_att_k_size, "prev_value": decoder.mega_att_v_size}
    return [
        {
            "ema_state": torch.randn(batch, decoder.output_size, decoder.mega_num_heads),
            **{name: torch.randn(batch, rows, width) for name, width in sizes.items()},
        }
        for _ in range(decoder.num_blocks)
    ]


def cost(decoder: torch.nn.Module, batch: int, history: int) -> tuple[int, int]:
    """Returns (bytes, multiply and add operations) of a step: weights and history read once, states written once."""
    weights = sum(p.numel() for p in decoder.mega_blocks.parameters() if p.ndim == 2)
    width = decoder.mega_att_k_size + decoder.mega_att_v_size
    rows = decoder.num_blocks * batch * width
    average = decoder.num_blocks * batch * decoder.output_size * decoder.mega_num_heads
    attended = history + 2  # plus the phantom row and the new label
    return 4 * (weights + rows * attended + 2 * average), 2 * (batch * weights + rows * attended)


def _variant(decoder: torch.nn.Module, step: Callable, batch: int, history: int) -> Variant:
    labels, states = torch.full((batch, 1), 3), _states(decoder, batch, history)

    def before():
        with torch.no_grad():
            return decoder.inference(labels, states)[1] if history else states

    def one(states):
        with torch.no_grad():
            return step(labels, states)

    return Variant(one, prepare=before)


@benchmark(NAME)
def measure(
    run: Run,
    *,
    size: str = "default",
    histories: tuple[int, ...] = HISTORIES,
    batches: tuple[int, ...] = BATCHES,
) -> Iterator[list[Row]]:
    """Yields the rows of each batch size and history. Raises ``upstream.MissingUpstream``."""
    todo = [unit for unit in cases(histories, batches) if not run.skip(*unit[:2], FORWARD)]
    if not todo:
        return
    theirs, ours = decoders(size)
    steps = {UPSTREAM: (theirs, theirs.inference), FASTASR: (ours, ours.inference)}
    if run.compile_model:
        steps[COMPILE] = (theirs, torch.compile(copy.deepcopy(theirs).inference))
    for case, shape, history, batch in todo:
        run.report(f"{NAME}: {shape}, {case}")
        variants = {name: _variant(*pair, batch, history) for name, pair in steps.items()}
        moved, flops = cost(theirs, batch, history)
        copied = limits.copy_seconds(moved)
        limit = max((copied, f"copy {moved / copied / 1e9:.1f} GB/s"), product_limit(flops))
        fields = {"case": case, "shape": shape, "pass_": FORWARD, "bytes": moved}
        yield run.rows(variants, flops, limit, reps=run.reps or 2 * run.settings.reps, warmup=3, **fields)
