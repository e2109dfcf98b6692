# SPDX-License-Identifier: Apache-2.0
"""ESPnet's MEGA decoder at its default sizes (500 symbols, 4 blocks): a batch of sequences, forward and with
gradients, and one step of a search from histories of several lengths.

The implementations are upstream as shipped, upstream with only its linears replaced (how much of the gain is the
GEMM's), upstream under torch.compile, upstream swapped by ``accelerate``, and fastasr's own class.
"""

import copy
from collections.abc import Callable, Iterator

import torch

from fastasr.benchmarks import upstream
from fastasr.benchmarks.models import unit
from fastasr.benchmarks.models.unit import (
    BOTH,
    COMPILE,
    FASTASR,
    FORWARD,
    LINEAR,
    UPSTREAM,
    Run,
    benchmark,
    swapped,
    with_linear,
)
from fastasr.benchmarks.rows import Row

NAME = "mega"
WHOLE, STEP = "whole model", "one step after {} labels"
OWN = "fastasr own"
HISTORIES = (0, 50, 200)
VOCABULARY, BATCH, LENGTH = 500, 4, 200
SIZES = {
    "default": {},
    "tiny": {"block_size": 32, "linear_size": 64, "qk_size": 16, "v_size": 64, "num_blocks": 2},
}
QUICK = {"size": "tiny", "batch": 2, "length": 20, "histories": HISTORIES[:2]}


def shape_name(size: str = "default", batch: int = BATCH, length: int = LENGTH) -> str:
    return f"{size} {batch}x{length}"


def decoder(size: str) -> torch.nn.Module:
    """Returns upstream's decoder with random parameters. Raises ``upstream.MissingUpstream``."""
    shipped = upstream.module("espnet2.asr_transducer.decoder.mega_decoder").MEGADecoder
    torch.manual_seed(0)
    return shipped(VOCABULARY, **SIZES[size])


def variants(shipped: torch.nn.Module, size: str) -> dict[str, Callable[[], torch.nn.Module]]:
    """Returns functions that make each implementation's model from upstream's."""

    def own():
        from fastasr.models.mega import MEGADecoder

        model = MEGADecoder(VOCABULARY, **SIZES[size])
        model.load_state_dict(shipped.state_dict())
        return model

    return {
        UPSTREAM: lambda: shipped,
        LINEAR: lambda: copy.deepcopy(shipped),
        FASTASR: lambda: swapped(shipped),
        OWN: own,
    }


def _step(
    model: torch.nn.Module, history: int, inference: Callable | None = None
) -> Callable[[], torch.Tensor]:
    """Calls ``score`` for one label, or ``inference`` for a compiled model."""
    states = model.init_state()
    if history:
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        states = [
            {
                "ema_state": normal(1, *state["ema_state"].shape),
                "prev_key": normal(1, history, model.mega_att_k_size),
                "prev_value": normal(1, history, model.mega_att_v_size),
            }
            for state in states
        ]
    sequence, label = [0] * history + [7], torch.tensor([[7]])

    def run():
        with torch.no_grad():
            if inference is not None:
                return inference(label, states)[0]
            model.score_cache.clear()  # Without the cache every call computes.
            return model.score(sequence, states)[0]

    return run


@benchmark(NAME)
def measure(
    run: Run,
    *,
    size: str = "default",
    batch: int = BATCH,
    length: int = LENGTH,
    histories: tuple[int, ...] = HISTORIES,
) -> Iterator[list[Row]]:
    """Yields the rows of the whole decoder in both passes, then of one step from each history. torch.compile takes
    minutes. Raises ``upstream.MissingUpstream``.
    """
    run.report(f"{NAME}: building upstream's decoder ({size}) and its replacements")
    shipped = decoder(size)
    models = run.made(variants(shipped, size))
    compiled = copy.deepcopy(shipped) if run.compile_model else None
    labels = torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))
    name = shape_name(size, batch, length)

    def whole(pass_: str) -> dict[str, Callable]:
        every = dict(models) | ({COMPILE: compiled} if compiled is not None else {})
        return unit.runs_of(every, pass_, labels)

    def step(history: int) -> dict[str, Callable]:
        runs = {key: _step(model.eval(), history) for key, model in models.items()}
        runs[LINEAR] = with_linear(runs[LINEAR])
        if compiled is not None:
            runs[COMPILE] = _step(compiled.eval(), history, torch.compile(compiled.inference))
        return runs

    units = [(WHOLE, pass_, name, lambda p=pass_: whole(p)) for pass_ in (FORWARD, BOTH)]
    units += [(STEP.format(h), FORWARD, f"{size} 1x1", lambda h=h: step(h)) for h in histories]
    for case, pass_, shape, make in units:
        if not run.skip(case, shape, pass_):
            yield run.unit(case, pass_, shape, make())
