# SPDX-License-Identifier: Apache-2.0
"""The predictor of torchaudio's base Emformer RNN-T (three LSTM layers of 512 with LayerNorm): a batch of label
sequences, forward and with gradients, and one step of a search.

The implementations are upstream as shipped, upstream with only its linears replaced (how much of the gain is the
GEMM's), upstream under torch.compile, and fastasr's own class with the same parameters.
"""

import copy
from collections.abc import Iterator

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
    weighted_step,
    with_linear,
)
from fastasr.benchmarks.rows import Row

NAME = "emformer_rnnt"
PREDICTOR, STEP = "predictor", "predictor, one step"
SYMBOLS = 4097
SIZES = {
    "base": {"output_dim": 1024, "symbol_embedding_dim": 512, "num_lstm_layers": 3, "lstm_hidden_dim": 512},
    "tiny": {"output_dim": 24, "symbol_embedding_dim": 16, "num_lstm_layers": 2, "lstm_hidden_dim": 16},
}
SEQUENCES, STEPS = ((4, 50), (1, 50), (16, 50)), (1, 10)  # batch and labels; batches of a step
QUICK = {"size": "tiny", "sequences": ((2, 3),), "steps": (2,)}


def predictors(size: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Returns upstream's predictor with random parameters, and fastasr's. Raises ``upstream.MissingUpstream``."""
    from fastasr.models.emformer_rnnt import Predictor

    theirs = upstream.module("torchaudio.models.rnnt")._Predictor
    torch.manual_seed(0)
    options = SIZES[size] | {"lstm_layer_norm": True, "lstm_layer_norm_epsilon": 1e-3, "lstm_dropout": 0.3}
    shipped, own = theirs(SYMBOLS, **options), Predictor(SYMBOLS, **options)
    own.load_state_dict(shipped.state_dict())
    return shipped, own


@benchmark(NAME)
def measure(
    run: Run,
    *,
    size: str = "base",
    sequences: tuple[tuple[int, int], ...] = SEQUENCES,
    steps: tuple[int, ...] = STEPS,
) -> Iterator[list[Row]]:
    """Yields the rows of each case and pass. Raises ``upstream.MissingUpstream``."""
    units = [(PREDICTOR, *shape, pass_) for shape in sequences for pass_ in (FORWARD, BOTH)]
    units += [(STEP, batch, 1, FORWARD) for batch in steps]
    units = [u for u in units if not run.skip(u[0], f"{size} {u[1]}x{u[2]}", u[3])]
    if not units:
        return
    shipped, own = predictors(size)
    models = {UPSTREAM: shipped, FASTASR: own}
    for case, batch, length, pass_ in units:
        labels, lengths = torch.randint(0, SYMBOLS, (batch, length)), torch.full((batch,), length)
        runs = {}
        for name, model in models.items():
            model.train(pass_ == BOTH)
            with torch.no_grad():
                state = model(labels, lengths)[2] if case == STEP else None
            if pass_ == BOTH:
                weight = torch.randn(*labels.shape, model.linear.out_features)
                runs[name] = weighted_step(model, weight, labels, lengths)
            else:
                runs[name] = inference(model, labels, lengths, state)
        runs = {UPSTREAM: runs[UPSTREAM], LINEAR: with_linear(runs[UPSTREAM]), FASTASR: runs[FASTASR]}
        if run.compile_model and case == STEP:  # A loop over 50 labels compiles for minutes.
            runs[COMPILE] = inference(torch.compile(copy.deepcopy(shipped).eval()), labels, lengths, state)
        yield run.unit(case, pass_, f"{size} {batch}x{length}", runs, 2 * run.settings.reps)
