# SPDX-License-Identifier: Apache-2.0
"""``generate`` of transformers' Whisper for a recording of 30 s, greedy and with beams: as shipped, swapped, swapped
with weights in int8, and CTranslate2, the engine of faster-whisper, with the same weights in float32 and in int8.

Weights are random and the number of tokens is fixed. The least time is that of the encoder's products, and for each
token that of reading the decoder's weights and the keys and values of the frames once.
"""

import contextlib
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection

import torch

from fastasr.benchmarks import upstream
from fastasr.benchmarks.harness import Variant
from fastasr.benchmarks.markdown import by_machine
from fastasr.benchmarks.models.unit import (
    FASTASR,
    FORWARD,
    INT8,
    UPSTREAM,
    Run,
    benchmark,
    product_flops,
    reduced,
    steps_limit,
    swapped,
)
from fastasr.benchmarks.rows import Row
from fastasr.benchmarks.table import Unit, duration, percent, times

NAME = "whisper_generate"
SPAWN = multiprocessing.get_context("spawn")
CTRANSLATE2 = {"ctranslate2": "float32", "ctranslate2 int8": "int8"}
# width, layers, heads
SIZES = {"base": (512, 6, 8), "small": (768, 12, 12), "tiny": (16, 1, 2)}
VOCABULARY, PROMPT = 51865, (50258, 50259, 50359, 50363)  # begin, English, transcribe, without times
NAMED = {50257: "endoftext", 50258: "startoftranscript", 50259: "en", 50358: "translate", 50359: "transcribe"}
NAMED |= {50361: "startofprev", 50362: "nospeech", 50363: "notimestamps", 50364: "0.00"}
QUICK = {"sizes": ("tiny",), "beams": (1, 2), "tokens": 3}


def whisper(size: str) -> torch.nn.Module:
    """Returns upstream's model. Raises ``upstream.MissingUpstream``."""
    transformers = upstream.module("transformers")
    width, layers, heads = SIZES[size]
    sizes = {"d_model": width, "vocab_size": VOCABULARY}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": layers, f"{part}_attention_heads": heads, f"{part}_ffn_dim": 4 * width}
    torch.manual_seed(0)
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes)).eval()


def _generate(model: torch.nn.Module, features: torch.Tensor, beams: int, tokens: int) -> Callable:
    given = {"input_features": features, "decoder_input_ids": torch.tensor([PROMPT]), "do_sample": False}
    return lambda: model.generate(**given, num_beams=beams, max_new_tokens=tokens, min_new_tokens=tokens)


def _converted(model: torch.nn.Module, folder: str) -> None:
    """Writes the model in the format of CTranslate2, whose own command asks for a tokenizer."""
    loader = upstream.module("ctranslate2.converters.transformers").WhisperLoader()
    spec = loader.get_model_spec(model)
    names = (f"<|{NAMED[i]}|>" if i in NAMED else f"token {i}" for i in range(VOCABULARY))
    spec.register_vocabulary(list(names))
    spec.config.suppress_ids, spec.config.suppress_ids_begin = [], []
    spec.config.alignment_heads, spec.config.lang_ids = [[0, 0]], [50259]
    spec.validate()
    spec.optimize()
    spec.save(folder)


@contextlib.contextmanager
def _peers(
    model: torch.nn.Module, features: torch.Tensor, beams: int, tokens: int
) -> Iterator[dict[str, Callable]]:
    """Yields the calls of CTranslate2, each in a process of its own: in a process with two runtimes of OpenMP torch's
    threads sleep between short products, and waking them takes longer than the products. Raises
    ``upstream.MissingUpstream``."""
    upstream.module("ctranslate2")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        _converted(model, folder)
        calls = {}
        for name, kind in CTRANSLATE2.items():
            ours, theirs = SPAWN.Pipe()
            given = folder, kind, torch.get_num_threads(), features.numpy(), beams, tokens
            process = SPAWN.Process(target=_serve, args=(theirs, *given), daemon=True)
            process.start()
            theirs.close()  # If the process ends, reading its answer raises EOFError.
            stack.callback(process.kill)
            ours.recv()
            calls[name] = partial(_asked, ours)
        yield calls


def _asked(pipe: Connection) -> None:
    pipe.send(None)
    pipe.recv()


def _serve(pipe: Connection, folder: str, kind: str, threads: int, features, beams: int, tokens: int) -> None:
    """Generates once, and again at every message, each of which it answers when it is done."""
    engine = upstream.module("ctranslate2")
    model = engine.models.Whisper(folder, compute_type=kind, intra_threads=threads)
    given, prompts = engine.StorageView.from_array(features), [list(PROMPT)]
    # It makes half of max_length's tokens at most.
    options = {"beam_size": beams, "max_length": 2 * (tokens + len(PROMPT)), "suppress_blank": False}
    found = model.generate(given, prompts, **options)[0].sequences_ids[0]
    options["max_length"] -= 2 * (len(found) - tokens)
    while True:
        model.generate(given, prompts, **options)
        pipe.send(None)
        pipe.recv()


def _least(model: torch.nn.Module, features: torch.Tensor, tokens: int) -> tuple[int, tuple[float, str]]:
    """Returns the encoder's multiply and add operations, and the least seconds with what sets them."""
    with torch.no_grad():
        flops = product_flops(lambda: model.model.encoder(features))
    width, layers, frames = model.config.d_model, model.config.decoder_layers, features.shape[2] // 2
    weights = sum(p.numel() for p in model.model.decoder.layers.parameters()) + VOCABULARY * width
    read = 4 * (weights + 2 * layers * frames * width)
    return flops, steps_limit(flops, tokens * read)


@benchmark(NAME)
def measure(
    run: Run, *, sizes: tuple = ("base", "small"), beams: tuple = (1, 5), tokens: int = 56
) -> Iterator[list[Row]]:
    """Yields the rows of each size and number of beams."""
    features = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(1))
    for size in sizes:
        shape = f"{size}, 1 x 30 s, {tokens} tokens"
        asked = {n: "greedy" if n == 1 else f"{n} beams" for n in beams}
        asked = {n: case for n, case in asked.items() if not run.skip(case, shape, FORWARD)}
        if not asked:
            continue
        shipped = whisper(size)
        models = {UPSTREAM: shipped, FASTASR: swapped(shipped), INT8: reduced(shipped, "int8")}
        flops, limit = _least(shipped, features, tokens)
        for n, case in asked.items():
            runs = {key: _generate(model, features, n, tokens) for key, model in models.items() if model}
            fields = {"case": case, "shape": shape, "pass_": FORWARD}
            with contextlib.ExitStack() as stack:
                try:
                    runs |= stack.enter_context(_peers(shipped, features, n, tokens))
                except upstream.MissingUpstream as reason:
                    run.report(f"{NAME}: CTranslate2 is left out: {reason}")
                run.report(f"{NAME}: {shape}, {case}: {', '.join(runs)}")
                variants = {key: Variant(call) for key, call in runs.items()}
                rows = run.rows(variants, flops, limit, reps=run.reps or 3, warmup=1, **fields)
            yield rows


def table(rows: Sequence[Row]) -> str:
    """Returns a Markdown table: a search per line, its times in float32 and in int8."""
    figures = "upstream | CTranslate2 | **fastasr** | gain | share of the limit | CTranslate2 int8 | **fastasr int8**"
    return by_machine(rows, "", figures, _line)


def _line(unit: Unit) -> list[list[str]]:
    floats, integers = CTRANSLATE2
    ours = unit.row(FASTASR)
    return [
        [
            f"{unit.first.shape}, {unit.first.case}",
            *(duration(unit.median(name)) for name in (UPSTREAM, floats, FASTASR)),
            times(unit.ratio(UPSTREAM)),
            percent(ours.fraction_of_limit if ours else None),
            *(duration(unit.median(name)) for name in (integers, INT8)),
        ]
    ]
