# SPDX-License-Identifier: Apache-2.0
"""Train a small character language model, a MEGADecoder on its own, on the transcripts of Debian's telephone prompts.

    python examples/train_char_lm.py [--text FILE] [--steps 300] [--backends eager fused] [--log losses.csv]
        [--report perplexity.json]

The same seed trains once per backend: "eager" is the formula in PyTorch, "fused" the kernels. Every tenth line is held
out; the perplexity per character on those lines must come out the same. At the end the model continues a few words,
one ``score`` at a time, as a transducer's decoder would. ``--text`` takes a file of one's own with a sentence per line.
"""

import argparse
import csv
import itertools
import json
import math
import random
import time
from pathlib import Path

import torch
from torch import Tensor

import fastasr
from fastasr.asr.audio import recordings
from fastasr.benchmarks.environment import stamp
from fastasr.models.mega import MEGADecoder

BOUNDARY = 0  # before the first and after the last character; also the padding


class CharacterModel(torch.nn.Module):
    """Next-character logits (B, L, V) of label sequences (B, L) that begin with BOUNDARY."""

    def __init__(self, vocabulary: int, size: int, blocks: int, positions: int):
        super().__init__()
        # The padding label's embedding is 0, and a row of zeros divided by a deviation of 1e-6 (the epsilon of ESPnet's
        # LayerNorm is 1e-12) has gradients a million times too large in every block: it must not begin the lines.
        padding = vocabulary
        self.decoder = MEGADecoder(
            vocabulary + 1,
            block_size=size,
            linear_size=2 * size,
            qk_size=size // 2,
            v_size=2 * size,
            num_blocks=blocks,
            max_positions=positions,
            embed_pad=padding,
        )
        self.output = torch.nn.Linear(size, vocabulary)

    def forward(self, labels: Tensor) -> Tensor:
        return self.output(self.decoder(labels))


# --------------------------------------------------------------------------- text
def sentences(text: Path | None, cache: Path) -> list[str]:
    if text is not None:
        return [line.strip() for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    reason = recordings.fetch_prompts(cache, print)
    if reason:
        raise SystemExit(f"the transcripts cannot be fetched here: {reason}; use --text FILE")
    return list(recordings.prompt_transcripts(cache).values())


def batches(lines: list[list[int]], size: int, seed: int):
    """Yields endless batches of similar length, in a seeded order: (labels, targets), padded with BOUNDARY and -100."""
    draw = random.Random(seed)
    order = sorted(range(len(lines)), key=lambda i: len(lines[i]))
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    while True:
        draw.shuffle(groups)
        for group in groups:
            yield collate([lines[i] for i in group])


def collate(lines: list[list[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, lines)) + 1
    labels = torch.full((len(lines), longest), BOUNDARY)
    targets = torch.full((len(lines), longest), -100)
    for row, line in enumerate(lines):
        labels[row, 1 : len(line) + 1] = torch.tensor(line)
        targets[row, : len(line) + 1] = torch.tensor([*line, BOUNDARY])
    return labels, targets


# --------------------------------------------------------------------------- training
def loss_of(model: CharacterModel, labels: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    return torch.nn.functional.cross_entropy(
        model(labels).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction=reduction
    )


@torch.no_grad()
def perplexity(model: CharacterModel, lines: list[list[int]]) -> float:
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(lines), 16):
        labels, targets = collate(lines[start : start + 16])
        total += loss_of(model, labels, targets, "sum").item()
        count += int((targets >= 0).sum())
    model.train()
    return math.exp(total / count)


def train(backend: str, options, training: list[list[int]], held_out: list[list[int]], vocabulary: int):
    """Trains once from ``options.seed``; returns the model, its losses and its result on the held-out lines."""
    torch.manual_seed(options.seed)
    longest = max(512, *(len(line) + 1 for line in training + held_out))
    model = CharacterModel(vocabulary, options.size, options.blocks, longest)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=options.steps, pct_start=0.1)
    stream = itertools.islice(batches(training, options.batch, options.seed), options.steps)
    losses, start = [], time.perf_counter()
    with fastasr.backend("eager" if backend == "eager" else "auto"):
        for step, (labels, targets) in enumerate(stream, 1):
            loss = loss_of(model, labels, targets)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if step % max(1, options.steps // 5) == 0:
                print(f"{backend}: step {step}: loss {loss.item():.4f}", flush=True)
        seconds = time.perf_counter() - start
        result = perplexity(model, held_out)
    print(
        f"{backend}: held-out perplexity {result:.4f} per character, "
        f"{1e3 * seconds / options.steps:.1f} ms per step",
        flush=True,
    )
    return model, losses, result


@torch.no_grad()
def continued(model: CharacterModel, prompt: list[int], length: int) -> list[int]:
    """Returns the most likely next characters, one decoder step each."""
    model.eval()
    states, sequence = model.decoder.init_state(), [BOUNDARY, *prompt]
    for end in range(1, len(sequence) + 1):
        output, states = model.decoder.score(sequence[:end], states)
    while len(sequence) <= len(prompt) + length:
        character = int(model.output(output).argmax())
        if character == BOUNDARY:
            break
        sequence.append(character)
        output, states = model.decoder.score(sequence, states)
    return sequence[1:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, help="a sentence per line, instead of the prompts")
    parser.add_argument(
        "--cache", type=Path, default=Path("demo/cache"), help="downloads (default: %(default)s)"
    )
    parser.add_argument("--backends", nargs="+", choices=("eager", "fused"), default=["eager", "fused"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="a CSV file: step, and the loss of each backend")
    parser.add_argument(
        "--report", type=Path, help="a JSON file: held-out perplexities, settings, commit, machine, versions"
    )
    options = parser.parse_args()

    text = [line.lower() for line in sentences(options.text, options.cache)]
    characters = sorted(set("".join(text)))
    number = {c: i for i, c in enumerate(characters, 1)}
    lines = [[number[c] for c in line] for line in text]
    held_out, training = lines[::10], [line for i, line in enumerate(lines) if i % 10]
    count = sum(map(len, training))
    print(
        f"{len(training)} lines of {count} characters ({len(characters)} distinct), {len(held_out)} lines held out"
    )

    results, losses = {}, {}
    for backend in options.backends:
        model, losses[backend], results[backend] = train(
            backend, options, training, held_out, len(characters) + 1
        )
    if len(results) == 2:
        difference = abs(results["eager"] / results["fused"] - 1)
        print(
            f"perplexity eager {results['eager']:.4f}, fused {results['fused']:.4f}: {difference:.1e} apart"
        )
    if options.log:
        with options.log.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["step", *losses])
            rows.writerows(
                [step, *values] for step, values in enumerate(zip(*losses.values(), strict=True), 1)
            )
    if options.report:
        settings = ("steps", "batch", "size", "blocks", "seed")
        report = {
            "held_out_perplexity": results,
            "held_out_lines": len(held_out),
            **{name: getattr(options, name) for name in settings},
            **stamp(),
        }
        options.report.write_text(json.dumps(report, indent=1) + "\n")
    start = lines[0][: max(1, len(lines[0]) // 3)]
    print("continued:", "".join(characters[c - 1] for c in continued(model, start, 40)))


if __name__ == "__main__":
    main()
