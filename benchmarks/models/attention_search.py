# SPDX-License-Identifier: Apache-2.0
"""Searches of decoders that attend to an encoder's frames, as shipped and swapped: those of FireRedASR, ESPnet,
SpeechBrain and NeMo, with random weights and a part of the published number of layers, for a recording whose encoder
gave 250 frames.

The least time is that of projecting the frames once, and for each token that of reading the decoder's weights and the
keys and values of the frames.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from fastasr.benchmarks import upstream
from fastasr.benchmarks.harness import Variant
from fastasr.benchmarks.models.unit import FASTASR, FORWARD, UPSTREAM, Run, benchmark, steps_limit, swapped
from fastasr.benchmarks.rows import Row

NAME = "attention_search"
QUICK = {"width": 64, "layers": 1, "frames": 9, "tokens": 3}


@dataclass(frozen=True)
class Search:
    """``make(width, layers)`` returns a decoder, ``call(decoder, frames, tokens)`` searches with so many beams."""

    beams: int
    make: Callable[[int, int], torch.nn.Module]
    call: Callable[[torch.nn.Module, torch.Tensor, int], object]


VOCABULARY = 4000


def _firered(width: int, layers: int) -> torch.nn.Module:
    home = upstream.module("fireredasr.models.module.transformer_decoder")
    return home.TransformerDecoder(3, 4, 2, VOCABULARY, layers, width // 64, width)


def _firered_search(decoder: torch.nn.Module, frames: torch.Tensor, tokens: int) -> object:
    mask = frames.new_ones(1, 1, frames.shape[1])
    return decoder.batch_beam_search(frames, mask, beam_size=3, decode_max_len=tokens)


def _espnet(width: int, layers: int) -> torch.nn.Module:
    home = upstream.module("espnet2.asr.decoder.transformer_decoder")
    logging.getLogger("espnet.nets.beam_search").setLevel(
        logging.ERROR
    )  # It warns of a search that is cut off.
    return home.TransformerDecoder(
        VOCABULARY, width, attention_heads=width // 64, linear_units=4 * width, num_blocks=layers
    )


def _espnet_search(decoder: torch.nn.Module, frames: torch.Tensor, tokens: int) -> object:
    home, end = upstream.module("espnet.nets.batch_beam_search"), VOCABULARY - 1
    search = home.BatchBeamSearch(
        {"decoder": decoder}, {"decoder": 1.0}, 10, VOCABULARY, end, end, pre_beam_score_key=None
    )
    return search(frames[0], maxlenratio=-tokens)  # negative: a number of tokens


def _speechbrain(width: int, layers: int) -> torch.nn.Module:
    home = upstream.module("speechbrain.lobes.models.transformer.TransformerASR")
    last = upstream.module("speechbrain.nnet.linear").Linear(VOCABULARY, input_size=width)
    sizes = {"nhead": width // 64, "num_encoder_layers": 1, "num_decoder_layers": layers, "d_ffn": 4 * width}
    options = {"normalize_before": True, "causal": False}
    return torch.nn.ModuleList((home.TransformerASR(VOCABULARY, width, width, **sizes, **options), last))


def _speechbrain_search(model: torch.nn.Module, frames: torch.Tensor, tokens: int) -> object:
    home, ratio = upstream.module("speechbrain.decoders.seq2seq"), tokens / frames.shape[1]
    ratios = {"min_decode_ratio": ratio, "max_decode_ratio": ratio}
    search = home.S2STransformerBeamSearcher(
        [*model], 1.0, bos_index=1, eos_index=2, beam_size=10, using_eos_threshold=False, **ratios
    )
    return search(frames, frames.new_ones(1))


def _nemo(width: int, layers: int) -> torch.nn.Module:
    home = upstream.module("nemo.collections.asr.modules.transformer.transformer_decoders")
    return home.TransformerDecoder(layers, width, 4 * width, width // 128 or 1, pre_ln=True)


def _nemo_search(decoder: torch.nn.Module, frames: torch.Tensor, tokens: int) -> object:
    """Steps as GreedySequenceGenerator makes them, whose module needs all of NeMo."""
    memory, mask = None, frames.new_ones(frames.shape[:2])
    for _ in range(tokens):
        token = frames[:, :1]
        memory, _ = decoder(token, mask[:, :1], frames, mask, memory, return_mems=True)
    return memory


SEARCHES = {
    "FireRedASR": Search(3, _firered, _firered_search),
    "ESPnet's Transformer": Search(10, _espnet, _espnet_search),
    "SpeechBrain's Transformer": Search(10, _speechbrain, _speechbrain_search),
    "NeMo's Transformer": Search(1, _nemo, _nemo_search),
}
WIDTHS = {"FireRedASR": 1280, "NeMo's Transformer": 1024}  # others: 512


@benchmark(NAME)
def measure(
    run: Run, *, width: int | None = None, layers: int = 4, frames: int = 250, tokens: int = 30
) -> Iterator[list[Row]]:
    """Yields the rows of each search, and leaves out those whose package is missing."""
    for name, search in SEARCHES.items():
        size = width or WIDTHS.get(name, 512)
        case = f"{name}, {search.beams} beams" if search.beams > 1 else f"{name}, greedy"
        shape = f"{layers} layers of {size}, {frames} frames, {tokens} tokens"
        if run.skip(case, shape, FORWARD):
            continue
        torch.manual_seed(0)
        try:
            shipped = search.make(size, layers).eval()
        except upstream.MissingUpstream as reason:
            run.report(f"{NAME}: {case} is left out: {reason}")
            continue
        weights = sum(
            part.weight.numel()
            for path, part in shipped.named_modules()
            if isinstance(part, torch.nn.Linear) and not {"encoder", "custom_src_module"} & {*path.split(".")}
        )
        projections, states = 2 * layers * size * size, 2 * layers * frames * size
        limit = steps_limit(2 * frames * projections, 4 * tokens * (weights - projections + states))
        x = torch.randn(1, frames, size)
        models = {UPSTREAM: shipped, FASTASR: swapped(shipped)}
        variants = {
            key: Variant(torch.no_grad()(partial(search.call, model, x, tokens)))
            for key, model in models.items()
        }
        run.report(f"{NAME}: {case}")
        fields = {"case": case, "shape": shape, "pass_": FORWARD}
        yield run.rows(variants, 2 * frames * projections, limit, reps=run.reps or 5, **fields)
