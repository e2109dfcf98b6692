# SPDX-License-Identifier: Apache-2.0
"""Searches of decoders that attend to an encoder's frames, as shipped and swapped: those of FireRedASR, ESPnet,
SpeechBrain and NeMo, with random weights and a part of the published number of layers, for a recording whose encoder
gave 250 frames. ESPnet's and SpeechBrain's also ask a language model and CTC, as their recipes do.

The least time is that of projecting the frames once, and for each token that of reading the weights of the decoder and
of the language model, and the keys and values of the frames.
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
    """``make(width, layers)`` returns a decoder or a search, ``call(model, frames, tokens)`` searches with so many
    beams. ``scored``: it asks a language model and CTC."""

    beams: int
    make: Callable[[int, int], torch.nn.Module]
    call: Callable[[torch.nn.Module, torch.Tensor, int], object]
    scored: bool = False


VOCABULARY = 4000


def _firered(width: int, layers: int) -> torch.nn.Module:
    home = upstream.module("fireredasr.models.module.transformer_decoder")
    return home.TransformerDecoder(3, 4, 2, VOCABULARY, layers, width // 64, width)


def _firered_search(decoder: torch.nn.Module, frames: torch.Tensor, tokens: int) -> object:
    mask = frames.new_ones(1, 1, frames.shape[1])
    return decoder.batch_beam_search(frames, mask, beam_size=3, decode_max_len=tokens)


def _espnet(width: int, layers: int, scored: bool = False) -> torch.nn.Module:
    home = upstream.module("espnet2.asr.decoder.transformer_decoder")
    search = upstream.module("espnet.nets.batch_beam_search").BatchBeamSearch
    logging.getLogger("espnet.nets.beam_search").setLevel(
        logging.ERROR
    )  # It warns of a search that is cut off.
    decoder = home.TransformerDecoder(
        VOCABULARY, width, attention_heads=width // 64, linear_units=4 * width, num_blocks=layers
    )
    scorers, weights, end = {"decoder": decoder}, {"decoder": 1.0}, VOCABULARY - 1
    if scored:
        sizes = {"att_unit": width, "head": width // 64, "unit": 4 * width, "layer": layers}
        scorers["lm"] = upstream.module("espnet2.lm.transformer_lm").TransformerLM(VOCABULARY, **sizes)
        ctc = upstream.module("espnet2.asr.ctc").CTC(VOCABULARY, width)
        scorers["ctc"] = upstream.module("espnet.nets.scorers.ctc").CTCPrefixScorer(ctc, end)
        weights = {"decoder": 0.7, "lm": 0.6, "ctc": 0.3}
    key = "full" if scored else None
    made: torch.nn.Module = search(scorers, weights, 10, VOCABULARY, end, end, pre_beam_score_key=key)
    return made


def _espnet_search(search: torch.nn.Module, frames: torch.Tensor, tokens: int) -> object:
    return search(frames[0], maxlenratio=-tokens)  # negative: a number of tokens


def _speechbrain(width: int, layers: int, scored: bool = False) -> torch.nn.Module:
    home = upstream.module("speechbrain.lobes.models.transformer.TransformerASR")
    linear = partial(upstream.module("speechbrain.nnet.linear").Linear, VOCABULARY, input_size=width)
    sizes = {"nhead": width // 64, "d_ffn": 4 * width}
    options = {
        "num_encoder_layers": 1,
        "num_decoder_layers": layers,
        "normalize_before": True,
        "causal": False,
    }
    model = home.TransformerASR(VOCABULARY, width, width, **sizes, **options)
    scorer, parts = None, []
    if scored:
        scorers = upstream.module("speechbrain.decoders.scorer")
        language = upstream.module("speechbrain.lobes.models.transformer.TransformerLM")
        parts = [language.TransformerLM(VOCABULARY, width, num_encoder_layers=layers, **sizes)]
        scorer = scorers.ScorerBuilder(
            weights={"transformerlm": 0.6, "ctc": 0.4},
            full_scorers=[scorers.TransformerLMScorer(*parts)],
            partial_scorers=[scorers.CTCScorer(linear(), blank_index=0, eos_index=2)],
            scorer_beam_scale=1.5,
        )
    search = upstream.module("speechbrain.decoders.seq2seq").S2STransformerBeamSearcher(
        [model, linear()],
        1.0,
        bos_index=1,
        eos_index=2,
        beam_size=10,
        using_eos_threshold=False,
        min_decode_ratio=0.0,
        max_decode_ratio=0.0,
        scorer=scorer,
    )
    return torch.nn.ModuleList((search, *parts))


def _speechbrain_search(model: torch.nn.Module, frames: torch.Tensor, tokens: int) -> object:
    search = model[0]
    search.min_decode_ratio = search.max_decode_ratio = tokens / frames.shape[1]
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
    "ESPnet's Transformer, language model and CTC": Search(
        10, partial(_espnet, scored=True), _espnet_search, True
    ),
    "SpeechBrain's Transformer": Search(10, _speechbrain, _speechbrain_search),
    "SpeechBrain's Transformer, language model and CTC": Search(
        10, partial(_speechbrain, scored=True), _speechbrain_search, True
    ),
    "NeMo's Transformer": Search(1, _nemo, _nemo_search),
}
WIDTHS = {"FireRedASR": 1280, "NeMo's Transformer": 1024}  # others: 512


def _read_at_each_token(model: torch.nn.Module) -> int:
    """Returns the number of elements of the matrices by which a step multiplies."""
    return sum(
        parameter.numel()
        for path, part in model.named_modules()
        for parameter in part.parameters(recurse=False)
        if parameter.dim() == 2
        and not isinstance(part, torch.nn.Embedding)
        and "model.encoder" not in path  # SpeechBrain's model has the encoder of the recogniser, too.
        and "model.custom_src_module" not in path
    )


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
        projections, states = 2 * layers * size * size, 2 * layers * frames * size
        once = projections + (size * VOCABULARY if search.scored else 0)
        read = _read_at_each_token(shipped) - projections + states
        limit = steps_limit(2 * frames * once, 4 * tokens * read)
        x = torch.randn(1, frames, size)
        models = {UPSTREAM: shipped, FASTASR: swapped(shipped)}
        variants = {
            key: Variant(torch.no_grad()(partial(search.call, model, x, tokens)))
            for key, model in models.items()
        }
        run.report(f"{NAME}: {case}")
        fields = {"case": case, "shape": shape, "pass_": FORWARD}
        yield run.rows(variants, 2 * frames * once, limit, reps=run.reps or 5, **fields)
