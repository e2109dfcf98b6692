# SPDX-License-Identifier: Apache-2.0
"""Train a Parakeet of transformers by transformers' Trainer, as it is and swapped, and compare.

    python examples/fine_tune_parakeet.py [--model FOLDER] [--speech FOLDER] [--steps 300] [--report FILE] [--plot FILE]
    python examples/fine_tune_parakeet.py --tdt ...

``--model`` is the folder of a ParakeetForCTC with its processor; without it a tiny model begins from random weights.
``--tdt`` trains a tiny ParakeetForTDT, whose swapped joint and loss never hold the logits. Afterwards upstream's code
runs the encoder, ``fastasr.asr.decoding`` reads what is held out, and the recordings are counted of which upstream's
``generate`` makes other tokens.
``--speech`` is a folder of recordings with a .txt beside each; without it Debian's telephone prompts are downloaded.
Each of three runs has a process of its own: upstream's code; the swapped model with upstream's random numbers, whose
losses are upstream's but for rounding; and the swapped model as it is used, whose attention draws its dropout itself.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from transformers import (
    AutoProcessor,
    ParakeetCTCConfig,
    ParakeetForCTC,
    ParakeetForTDT,
    ParakeetTDTConfig,
    Trainer,
    TrainingArguments,
)

import fastasr
from fastasr.asr import decoding
from fastasr.asr.audio.features import resample
from fastasr.asr.recipe import speech
from fastasr.asr.recipe.scoring import error_rate
from fastasr.asr.recipe.units import Units
from fastasr.benchmarks.environment import stamp
from fastasr.benchmarks.harness import peak_bytes

RUNS = ("upstream", "swapped, upstream's draws", "swapped")
TINY = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "num_mel_bins": speech.BINS,
    "subsampling_factor": 4,  # frames of 40 ms: telephone prompts have up to 20 characters a second
    "subsampling_conv_channels": 32,
    "layerdrop": 0.0,
}


class Ctc:
    """Batches and texts of a ParakeetForCTC; subclasses have its model, features and tokens."""

    generated_otherwise = None  # how many recordings ``generate`` makes other tokens of; None: not compared

    def collate(self, items: list[tuple[torch.Tensor, list[int]]]) -> dict[str, torch.Tensor]:
        return padded(items, -100)

    def transcript(self, model: ParakeetForCTC, batch: dict[str, torch.Tensor]) -> str:
        return self.decode(model(**batch).logits[0].argmax(-1).tolist())


class Characters(Ctc):
    """Model, features and characters of a tiny Parakeet with random weights."""

    def __init__(self, texts: list[str]):
        self.units = Units.learn("char", texts)

    def model(self) -> ParakeetForCTC:
        return ParakeetForCTC(
            ParakeetCTCConfig(vocab_size=len(self.units), pad_token_id=0, encoder_config=TINY)
        )

    @staticmethod
    def features(samples: torch.Tensor) -> torch.Tensor:
        x = speech.fbank(samples)
        return (x - x.mean(0)) / (x.std(0) + 1e-5)

    def encode(self, text: str) -> list[int]:
        return self.units.encode(text)

    def decode(self, labels: list[int]) -> str:
        return self.units.decode([label for label, _ in itertools.groupby(labels) if label])


class Tdt(Characters):
    """The same of a tiny ParakeetForTDT. Its padding is 0, its blank the last token."""

    generated_otherwise = 0

    def model(self) -> ParakeetForTDT:
        sizes = {"decoder_hidden_size": 96, "num_decoder_layers": 1, "pad_token_id": 0}
        blank = len(self.units)
        config = ParakeetTDTConfig(vocab_size=blank + 1, blank_token_id=blank, encoder_config=TINY, **sizes)
        model = ParakeetForTDT(config)
        outputs = blank + 1 + len(config.durations)
        model.generation_config.update(
            decoder_start_token_id=blank, suppress_tokens=[*range(blank + 1, outputs)]
        )
        return model

    def collate(self, items: list[tuple[torch.Tensor, list[int]]]) -> dict[str, torch.Tensor]:
        batch = padded(items, 0)
        contexts = torch.nn.functional.pad(batch["labels"], (1, 0), value=len(self.units))
        return batch | {"decoder_input_ids": contexts}

    def transcript(self, model: ParakeetForTDT, batch: dict[str, torch.Tensor]) -> str:
        inputs = {name: batch[name] for name in ("input_features", "attention_mask")}
        encoded = model.encoder(**inputs, output_attention_mask=True)
        lengths = encoded.attention_mask.sum(1)
        found = decoding.greedy_search(model, encoded.last_hidden_state, lengths).tokens[0]
        generated = model.generate(**inputs, return_dict_in_generate=True).sequences[0].tolist()
        nothing = 0, len(self.units)
        found, generated = ([t for t in tokens if t not in nothing] for tokens in (found, generated))
        self.generated_otherwise += generated != found
        return self.units.decode(found)


class Pretrained(Ctc):
    """Model, features and tokens of a folder."""

    def __init__(self, folder: Path):
        self.folder, self.processor = folder, AutoProcessor.from_pretrained(folder, local_files_only=True)

    def model(self) -> ParakeetForCTC:
        return ParakeetForCTC.from_pretrained(self.folder, local_files_only=True)

    def features(self, samples: torch.Tensor) -> torch.Tensor:
        extract = self.processor.feature_extractor
        samples = resample(samples, speech.RATE, extract.sampling_rate)
        found = extract(samples.numpy(), sampling_rate=extract.sampling_rate, return_tensors="pt")
        return found["input_features"][0, : int(found["attention_mask"].sum())]

    def encode(self, text: str) -> list[int]:
        return self.processor.tokenizer(text)["input_ids"]

    def decode(self, labels: list[int]) -> str:
        return self.processor.decode(labels, skip_special_tokens=True)


class Recorder(Trainer):
    """Keeps the loss of every step."""

    def training_step(self, *arguments, **options):
        loss = super().training_step(*arguments, **options)
        self.__dict__.setdefault("losses", []).append(loss.item())
        return loss


def joined(utterances, seconds: float, seed: int) -> list[tuple[torch.Tensor, str]]:
    """Returns features and texts of recordings, in random order, joined to ``seconds`` or a little more."""
    order, groups = list(utterances), []
    random.Random(seed).shuffle(order)
    while order:
        group = [order.pop()]
        while order and sum(each.seconds for each in group) < seconds:
            group.append(order.pop())
        groups.append(
            (torch.cat([each.features[0] for each in group]), " ".join(each.text for each in group))
        )
    return groups


def padded(items: list[tuple[torch.Tensor, list[int]]], label: int) -> dict[str, torch.Tensor]:
    """Returns a batch; ``label`` fills up the labels."""
    pad = torch.nn.utils.rnn.pad_sequence
    features, labels = zip(*items, strict=True)
    return {
        "input_features": pad(list(features), batch_first=True),
        "attention_mask": pad([torch.ones(len(x), dtype=torch.long) for x in features], batch_first=True),
        "labels": pad([torch.tensor(each) for each in labels], batch_first=True, padding_value=label),
    }


@torch.inference_mode()
def characters_wrong(model, task, held_out) -> float:
    model.eval()
    found = []
    for each in held_out:
        batch = task.collate([(each.features[0], [])])
        batch.pop("labels")
        found.append(task.transcript(model, batch))
    return error_rate([each.text for each in held_out], found)


def train(name: str, task, training, held_out, options) -> dict:
    """Trains once from ``options.seed``; returns losses, seconds, peak memory and the share of wrong characters."""
    torch.manual_seed(options.seed)
    model = task.model()
    if name != "upstream":
        fastasr.accelerate(model)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=options.rate,
            lr_scheduler_type="cosine",
            warmup_steps=options.steps // 10,
            seed=options.seed,
            use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False,
            save_strategy="no",
            logging_steps=max(1, options.steps // 5),
            report_to=[],
            disable_tqdm=True,
        )
        dataset = [(x, task.encode(text)) for x, text in joined(training, options.seconds, options.seed)]
        trainer = Recorder(model=model, args=settings, train_dataset=dataset, data_collator=task.collate)
        draws = fastasr.upstream_draws() if "draws" in name else contextlib.nullcontext()
        begun = time.perf_counter()
        with draws:
            peak = peak_bytes(trainer.train, str(trainer.args.device), rounds=1)
        seconds = time.perf_counter() - begun
    fastasr.restore(model)
    wrong = characters_wrong(model.cpu(), task, held_out)
    return {
        "losses": trainer.losses,
        "seconds": seconds,
        "peak_bytes": peak,
        "characters_wrong": wrong,
        "generated_otherwise": task.generated_otherwise,
    }


def plot(results: dict[str, dict], path: Path) -> None:
    """Draws the losses of the runs, with their time, memory and error rate."""
    from fastasr.benchmarks.plots import COLOURS, plain, png, pyplot

    picture, (losses, apart) = pyplot().subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    ours = COLOURS["fastasr"]
    styles = dict(zip(RUNS, ((COLOURS["upstream"], "-"), (ours, ":"), (ours, "-")), strict=True))
    for name, found in results.items():
        label = f"{name}: {found['seconds']:.0f} s, {found['peak_bytes'] / 2**20:.0f} MiB, "
        label += f"{found['characters_wrong']:.0%} of characters wrong"
        losses.plot(found["losses"], color=styles[name][0], linestyle=styles[name][1], lw=1.2, label=label)
        if name != "upstream":
            pairs = zip(found["losses"], results["upstream"]["losses"], strict=True)
            apart.plot(
                [abs(a / b - 1) for a, b in pairs], color=styles[name][0], linestyle=styles[name][1], lw=1.2
            )
    losses.set_title("loss of a step", fontsize=9, loc="left")
    apart.set_title("how far from upstream's", fontsize=9, loc="left")
    apart.set_yscale("log")
    losses.legend(fontsize=7, frameon=False)
    for axes in (losses, apart):
        plain(axes)
        axes.set_xlabel("step", fontsize=8)
    loads = ", ".join(f"{found['load']:.1f}" for found in results.values())
    text = f"load of the machine before each run: {loads} on {os.cpu_count()} processors"
    picture.suptitle(text, fontsize=8, x=0.01, ha="left")  # times of a busy machine say little
    path.write_bytes(png(picture))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a ParakeetForCTC with its processor")
    parser.add_argument(
        "--tdt", action="store_true", help="a tiny ParakeetForTDT instead of a ParakeetForCTC"
    )
    parser.add_argument("--speech", type=Path, help="recordings with transcripts, instead of the prompts")
    parser.add_argument(
        "--cache", type=Path, default=Path("demo/cache"), help="downloads (default: %(default)s)"
    )
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=3e-3, help="the highest learning rate")
    parser.add_argument("--seconds", type=float, default=3.0, help="recordings are joined to so much")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="a JSON file: losses, times, memory, settings, machine")
    parser.add_argument("--plot", type=Path, help="a PNG file: the losses")
    options = parser.parse_args()

    if options.model and options.tdt:
        parser.error("--tdt trains a tiny model: it takes no --model")
    speeches = {"cache": options.cache, "folder": options.speech, "speeds": (1.0,)}
    if options.model:
        task = Pretrained(options.model)
        training, held_out = speech.load(**speeches, features=task.features)
    else:
        training, held_out = speech.load(**speeches, features=Characters.features)
        task = (Tdt if options.tdt else Characters)([each.text for each in training + held_out])
    results = {}
    for name in options.runs:
        load = os.getloadavg()[0]
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            results[name] = found = process.submit(train, name, task, training, held_out, options).result()
        found["load"] = load
        print(
            f"{name}: loss {found['losses'][0]:.4f} to {found['losses'][-1]:.4f}, {found['seconds']:.1f} s, "
            f"{found['peak_bytes'] / 2**20:.0f} MiB, {found['characters_wrong']:.1%} of characters wrong"
        )
        if (otherwise := found["generated_otherwise"]) is not None:
            print(f"{name}: generate makes other tokens of {otherwise} of {len(held_out)} recordings")
    if options.report:
        settings = {
            key: str(value) for key, value in vars(options).items() if key not in ("cache", "report", "plot")
        }
        options.report.write_text(json.dumps({"runs": results, "settings": settings, **stamp()}) + "\n")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
