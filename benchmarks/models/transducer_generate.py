# SPDX-License-Identifier: Apache-2.0
"""``generate`` of transformers' Parakeet with a predictor of 2 LSTM layers of 640 and 8193 tokens, as shipped and
swapped: greedy search of TDT and RNN-T models after an encoder of one narrow layer, and a whole recording through a TDT
model with its encoder. A row's time is that of a call, cut off after as many steps as its shape says.

Weights are random. Blank's bias makes a part of the steps blank, more than half of RNN-T's, as in speech; no label has
duration 0, which random weights would repeat. The floor of a search is the longer of two times: copying as many
bytes as the weights have, once for each step, and computing the products.
"""

import copy
from collections.abc import Iterator

import torch

from fastasr.benchmarks import limits, upstream
from fastasr.benchmarks.harness import Variant
from fastasr.benchmarks.models import fast_conformer
from fastasr.benchmarks.models.unit import FASTASR, FORWARD, UPSTREAM, Run, benchmark, product_limit, swapped
from fastasr.benchmarks.rows import Row

NAME = "transducer_generate"
KINDS, BATCHES = ("TDT", "RNNT"), (1, 8)
BLANKS = {"TDT": 0.35, "RNNT": 0.95}  # share of blanks after random labels; a search meets fewer
NARROW = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
NARROW |= {"num_mel_bins": 16, "subsampling_conv_channels": 8}
RECORDING = "a recording"
WHOLE = ("0.6B", 24, 30, 200)  # size, layers, seconds of speech, steps
QUICK = {"tokens": 33, "hidden": 24, "frames": 20, "steps": 5, "batches": (2,), "whole": ("tiny", 1, 2, 5)}


def parakeet(kind: str, tokens: int, hidden: int, encoder: dict) -> torch.nn.Module:
    """Returns upstream's model. Raises ``upstream.MissingUpstream``."""
    transformers = upstream.module("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"Parakeet{kind}Config")(
        vocab_size=tokens, blank_token_id=tokens - 1, decoder_hidden_size=hidden, encoder_config=encoder
    )
    model = getattr(transformers, f"ParakeetFor{kind}")(config).eval()
    model.generation_config.decoder_start_token_id = tokens - 1
    head = model.joint.head
    with torch.no_grad():
        model.encoder_projector.weight.normal_()
        frames = _example(model, 64)[0]
        model.encoder_projector.weight /= frames.std(0).mean()
        model.encoder_projector.bias -= frames.mean(0) / frames.std(0).mean()
        for weight in (*model.decoder.parameters(), head.weight):
            weight.normal_(std=0.1)
        if kind == "TDT":
            model.generation_config.suppress_tokens = list(range(tokens, head.out_features))
            head.bias[tokens] = -100.0
        _, logits = _example(model, 64)
        best = logits[:, : tokens - 1].amax(1) - logits[:, tokens - 1]
        head.bias[tokens - 1] += best.quantile(BLANKS[kind])
    return model


@torch.no_grad()
def _example(model: torch.nn.Module, labels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns some frames of the encoder and logits of them after random labels."""
    x = torch.randn(1, 8 * labels, model.config.encoder_config.num_mel_bins)
    frames = model.get_audio_features(x).pooler_output[0]
    g = model.decoder(torch.randint(model.config.vocab_size, (1, len(frames))))[0]
    return frames, model.joint(encoder_hidden_states=frames, decoder_hidden_states=g)


def cost(model: torch.nn.Module, batch: int, steps: int) -> tuple[int, int]:
    """Returns (bytes, multiply and add operations) of that many steps."""
    parts = [
        *model.decoder.lstm.parameters(),
        model.decoder.decoder_projector.weight,
        model.joint.head.weight,
    ]
    weights = sum(p.numel() for p in parts)
    return 4 * weights * steps, 2 * batch * weights * steps


@benchmark(NAME)
def measure(
    run: Run,
    *,
    tokens: int = 8193,
    hidden: int = 640,
    frames: int = 188,
    steps: int = 64,
    batches: tuple[int, ...] = BATCHES,
    whole: tuple[str, int, int, int] = WHOLE,
) -> Iterator[list[Row]]:
    """Yields the rows of each kind and batch size, and those of a whole recording."""
    import fastasr

    for kind in KINDS:
        cases = [(batch, f"B={batch}, T={frames}, {steps} steps") for batch in batches]
        cases = [(batch, shape) for batch, shape in cases if not run.skip(kind, shape, FORWARD)]
        if not cases:
            continue
        theirs = parakeet(kind, tokens, hidden, NARROW)
        ours = copy.deepcopy(theirs)
        fastasr.accelerate(ours, only=[type(ours)])
        for batch, shape in cases:
            x = torch.randn(
                batch, 8 * frames, NARROW["num_mel_bins"], generator=torch.Generator().manual_seed(1)
            )
            run.report(f"{NAME}: {kind}, {shape}")
            variants = {
                name: Variant(lambda m=model, x=x: m.generate(x, max_new_tokens=steps))
                for name, model in ((UPSTREAM, theirs), (FASTASR, ours))
            }
            moved, flops = cost(theirs, batch, steps)
            copied = limits.copy_seconds(moved // steps) * steps
            limit = max((copied, f"copy {moved / copied / 1e9:.1f} GB/s"), product_limit(flops))
            fields = {"case": kind, "shape": shape, "pass_": FORWARD, "bytes": moved}
            yield run.rows(variants, flops, limit, reps=run.reps or run.settings.reps, **fields)
    size, layers, seconds, steps = whole
    shape = f"TDT {size}, {layers} layers, 1 x {seconds} s, {steps} steps"
    if run.skip(RECORDING, shape, FORWARD):
        return
    theirs = parakeet("TDT", tokens, hidden, fast_conformer.encoder_config(size, layers))
    models = {UPSTREAM: theirs, FASTASR: swapped(theirs)}
    features, mask = fast_conformer.batch_of(1, seconds)
    runs = {
        name: lambda m=model: m.generate(features, attention_mask=mask, max_new_tokens=steps)
        for name, model in models.items()
    }
    yield run.unit(RECORDING, FORWARD, shape, runs, reps=3)
