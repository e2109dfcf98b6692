# SPDX-License-Identifier: Apache-2.0
"""The Emformer of torchaudio's base RNN-T (20 layers of 512, 8 heads, left context 30), at segments of 16 frames with 4
of right context and of 4 with 1: whole utterances, a training step, and a segment of one stream.

The implementations are upstream as shipped, upstream with only its linears replaced (how much of the gain is the
GEMM's), upstream under torch.compile, upstream swapped by ``accelerate``, and fastasr's own class. The benchmark
``segment_attention`` measures the attention alone.
"""

import copy
from collections.abc import Callable, Iterator

import torch

from fastasr.benchmarks import upstream
from fastasr.benchmarks.models.unit import (
    BOTH,
    COMPILE,
    FASTASR,
    FORWARD,
    LINEAR,
    UPSTREAM,
    Run,
    benchmark,
    inference,
    swapped,
    weighted_step,
    with_linear,
)
from fastasr.benchmarks.rows import Row

NAME = "emformer"
OWN = "fastasr own"
WHOLE, SEGMENT = "segment {}, right {}", "one segment of {}, right {}"
SEGMENTS = ((16, 4), (4, 1))
BATCH, FRAMES = 4, 400
SIZES = {
    "base": {"input_dim": 512, "num_heads": 8, "ffn_dim": 2048, "num_layers": 20, "left_context_length": 30},
    "tiny": {"input_dim": 32, "num_heads": 2, "ffn_dim": 64, "num_layers": 2, "left_context_length": 6},
}
QUICK = {"size": "tiny", "segments": ((4, 1),), "batch": 2, "frames": 20}


def encoders(size: str, segment: int, right: int) -> dict[str, torch.nn.Module]:
    """Returns upstream's encoder with random parameters, the swapped one, and fastasr's. Raises
    ``upstream.MissingUpstream``.
    """
    from fastasr.models.emformer import Emformer

    theirs = upstream.module("torchaudio.models").Emformer
    torch.manual_seed(0)
    options = SIZES[size] | {"segment_length": segment, "right_context_length": right}
    options |= {"dropout": 0.1, "activation": "gelu", "tanh_on_mem": True}
    shipped, own = theirs(**options), Emformer(**options)
    own.load_state_dict(shipped.state_dict())
    return {UPSTREAM: shipped, FASTASR: swapped(shipped), OWN: own}


def _forward(model: Callable, x: torch.Tensor, lengths: torch.Tensor) -> Callable:
    return inference(lambda: model(x, lengths)[0])


def _both(model: torch.nn.Module, x: torch.Tensor, lengths: torch.Tensor) -> Callable:
    return weighted_step(model, torch.randn(x.shape[0], int(lengths.max()), x.shape[2]), x, lengths)


def _segment(model: torch.nn.Module, x: torch.Tensor, lengths: torch.Tensor) -> Callable:
    """Runs a step from full left context."""
    states = None
    with torch.no_grad():
        for _ in range(1 + model.left_context_length // model.segment_length):
            _, _, states = model.infer(x, lengths, states)

    return inference(lambda: model.infer(x, lengths, [list(layer) for layer in states])[0])


@benchmark(NAME)
def measure(
    run: Run,
    *,
    size: str = "base",
    segments: tuple[tuple[int, int], ...] = SEGMENTS,
    batch: int = BATCH,
    frames: int = FRAMES,
) -> Iterator[list[Row]]:
    """Yields the rows of each segment length: whole utterances in both passes, one segment of a stream. torch.compile
    takes minutes. Raises ``upstream.MissingUpstream``.
    """
    width = SIZES[size]["input_dim"]
    for segment, right in segments:
        whole, one = f"{size} {batch}x{frames}", f"{size} 1x{segment}"
        units = [(WHOLE.format(segment, right), pass_, whole) for pass_ in (FORWARD, BOTH)]
        units.append((SEGMENT.format(segment, right), FORWARD, one))
        units = [unit for unit in units if not run.skip(unit[0], unit[2], unit[1])]
        if not units:
            continue
        models = encoders(size, segment, right)
        for case, pass_, shape in units:
            streamed = shape == one
            rows, count = (1, segment) if streamed else (batch, frames)
            x = torch.randn(rows, count + right, width)
            lengths = torch.full((rows,), count + right if streamed else count)
            make = _segment if streamed else _both if pass_ == BOTH else _forward
            runs = {key: make(model.train(pass_ == BOTH), x, lengths) for key, model in models.items()}
            runs[LINEAR] = with_linear(runs[UPSTREAM])
            if run.compile_model and not streamed and pass_ == FORWARD:
                runs[COMPILE] = _forward(torch.compile(copy.deepcopy(models[UPSTREAM])), x, lengths)
            yield run.unit(case, pass_, shape, runs)
