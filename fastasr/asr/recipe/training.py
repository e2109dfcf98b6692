# SPDX-License-Identifier: Apache-2.0
"""The training loop. A step depends only on the checkpoint before it, the seed and its number.

A run that was killed and resumed therefore has the same losses as one without interruption. Several processes have the
losses of one, except with regularisers, because each process draws their random numbers by itself.
"""

import contextlib
import json
import random
import signal
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastasr
from fastasr import files
from fastasr.asr import decoding
from fastasr.asr.recipe import batches, checkpoints, parallel, scoring, sizes, speech
from fastasr.asr.recipe.eden import eden
from fastasr.asr.recipe.logs import Log
from fastasr.asr.recipe.scaled_adam import ScaledAdam
from fastasr.asr.recipe.units import Units

SIMPLE_SCALE, CTC_SCALE, LM_SCALE = 0.5, 0.2, 0.25
# With ten times the rate, AdamW collapses the output of encoders with LayerNorm to one vector for all frames within
# 100 steps.
BASE_LR = {"zipformer": 0.045, "emformer": 0.0003, "e_branchformer": 0.0003}
SLOWEST = 1.15  # a recording lasts at most this many times longer at the lowest of its speeds


@dataclass
class Options:
    """The options of one training run. Those in ``FIXED`` must not change when the run is resumed."""

    out: Path
    steps: int = 1000
    encoder: str = sizes.ZIPFORMER
    size: str = "small"
    max_duration: float = 15.0  # seconds of a batch, padding included
    seed: int = 1
    base_lr: float | None = None  # Eden's base rate; None: ``BASE_LR`` of the encoder
    lr_batches: float = 2000.0
    lr_epochs: float = 30.0
    warmup: int = 100  # steps until the pruned loss counts in full and the learning rate is reached
    schedule_speed: float = 40.0  # batches of the modules' schedules (20000 long) that a step counts as
    average_over: int = 400  # steps over which the averaged model is taken
    checkpoint_every: int = 1
    evaluate_every: int = 0  # steps; 0: only at the end
    augment: bool = True
    mask_after: int = 500  # steps before SpecAugment begins
    plain: bool = False  # train without regularisers
    bf16: bool = False
    backend: str = ""  # backend of fastasr's kernels; "" is automatic
    upstream: bool = False
    swap: bool = True
    FIXED = ("encoder", "size", "max_duration", "seed", "plain", "augment", "upstream")


@dataclass
class Progress:
    """The state of a run between two steps."""

    step: int = 0
    epoch: int = 0
    index: int = 0  # number of the next batch within the epoch
    seconds: float = 0.0
    averaged: int = 0
    scores: list = field(default_factory=list)  # [step, CER, WER] of every evaluation so far


class Trainer:
    """Trains on utterances; ``run`` returns the held-out error rates. ``say`` prints a line, ``show(row)`` a step's row
    of the log."""

    def __init__(
        self,
        options: Options,
        training: list[speech.Utterance],
        held_out: list[speech.Utterance],
        units: Units,
        world: parallel.World | None = None,
        say: Callable[[str], None] = print,
        show: Callable[[dict[str, Any]], None] = lambda row: None,
    ) -> None:
        self.options, self.held_out, self.units = options, held_out, units
        self.world = world or parallel.World()
        self.say, self.show = say, show
        self.arguments = sizes.config(options.size, len(units), speech.BINS, encoder=options.encoder)
        self.training, self.tokens = self._usable(training)
        self.progress = Progress()
        random.seed(options.seed)
        torch.manual_seed(options.seed)
        self.model = sizes.build(self.arguments, options.upstream).to(self.world.device).train()
        if options.plain:
            sizes.without_regularisers(self.model)
        if options.upstream:
            self._prepare_upstream()
        self._scheduled = [m for m in self.model.modules() if hasattr(m, "batch_count")]
        self.called = parallel.wrap(self.model, self.world)
        self.base_lr = BASE_LR[options.encoder] if options.base_lr is None else options.base_lr
        self.optimizer = _optimizer(options.encoder, self.model, self.base_lr)
        self.average = [p.detach().clone() for p in self.model.parameters()]
        self._batches: Any = None
        self._stopped = False

    def _usable(self, training: list[speech.Utterance]) -> tuple[list[speech.Utterance], list[list[int]]]:
        """Returns the utterances that have at least one frame of output per token, and their tokens."""
        kept = []
        for utterance in training:
            tokens = self.units.encode(utterance.text)
            if min(len(f) for f in utterance.features) // 4 - 2 > len(tokens):
                kept.append((utterance, tokens))
        if not kept:
            raise ValueError("no utterance is long enough for its transcript")
        return [u for u, _ in kept], [t for _, t in kept]

    def _prepare_upstream(self) -> None:
        if self.options.swap:
            report = fastasr.accelerate(self.model)
            self.say(f"accelerate: {len(report.replaced)} modules replaced")
            return
        if self.options.encoder != sizes.ZIPFORMER:
            return  # only the encoder is upstream's; the losses are ours
        from zipformer.modules import model as upstream

        try:
            import fast_rnnt
        except ImportError as error:
            raise ValueError(f"--no-swap needs fast_rnnt in k2's place: {error}") from None
        upstream.k2 = fast_rnnt

    # ----------------------------------------------------------------------- the run
    def run(self) -> dict[str, Any] | None:
        """Trains, starting from the checkpoint in ``out`` if there is one. Returns {"cer", "wer", ...} of the averaged
        model."""
        out = Path(self.options.out)
        if self.world.first:
            out.mkdir(parents=True, exist_ok=True)
        if (out / checkpoints.NAME).is_file():
            self.resume(checkpoints.load(out / checkpoints.NAME))
        log = Log(out / "log.csv", self.progress.step) if self.world.first else None
        with self._signals():
            while self.progress.step < self.options.steps and not self._stopped:
                began = time.perf_counter()
                row = self.step()
                self.progress.seconds += time.perf_counter() - began
                row["seconds"] = self.progress.seconds
                if log:
                    log.write(**row)
                    self.show(row)
                self._after_step()
        if log:
            log.close()
        if self._stopped:
            self.say(f"stopped after step {self.progress.step}; the same command goes on from there")
            return None
        result = self.evaluate()
        if self.world.first:
            self._report(result)
        return result

    def _after_step(self) -> None:
        options, step = self.options, self.progress.step
        if options.evaluate_every and step % options.evaluate_every == 0 and step < options.steps:
            result = self.evaluate()
            if self.world.first:
                self.progress.scores.append([step, result["cer"], result["wer"]])
                self.say(f"step {step}: held-out CER {result['cer']:.1%}, WER {result['wer']:.1%}")
        if step == options.steps or self._stopped or step % options.checkpoint_every == 0:
            state = self.state()
            if self.world.first:
                checkpoints.save(Path(options.out) / checkpoints.NAME, state)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Inside this context, SIGTERM and the first Ctrl-C end the run after the current step."""

        def stop(*_: Any) -> None:
            self._stopped = True

        try:
            before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # only the main thread may set signal handlers
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # ----------------------------------------------------------------------- a step
    def step(self) -> dict[str, Any]:
        """Trains on the next batch. Returns the log's row without ``seconds``."""
        options, progress, world = self.options, self.progress, self.world
        indices, shares = self._next_batch()
        x, lengths, tokens, weight = self._inputs(indices)
        random.seed(f"{options.seed} {progress.step}")
        torch.manual_seed(zlib.crc32(f"{options.seed} {progress.step} {world.rank}".encode()))
        for module in self._scheduled:
            module.batch_count = progress.step * options.schedule_speed
        rate = eden(
            self.base_lr,
            progress.step,
            progress.epoch,
            options.lr_batches,
            options.lr_epochs,
            warmup_batches=options.warmup,
        )
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with fastasr.backend(options.backend) if options.backend else contextlib.nullcontext():
            with torch.autocast(world.device.type, torch.bfloat16, enabled=options.bf16):
                simple, pruned, ctc, *_ = self.called(x, lengths, tokens, lm_scale=LM_SCALE)
            warm = min(1.0, progress.step / options.warmup) if options.warmup else 1.0
            parts = [simple * weight, pruned * weight, ctc * weight]
            scales = (1 - (1 - SIMPLE_SCALE) * warm, 0.1 + 0.9 * warm, CTC_SCALE)
            loss = sum(scale * part for scale, part in zip(scales, parts, strict=True)) / shares
            (loss * world.size).backward()
        parallel.average_ignored_gradients(self.model, world)
        self.optimizer.step()
        progress.step += 1
        self._update_average()
        values = parallel.total([float(loss.detach()), *(float(p.detach()) / shares for p in parts)], world)
        return {
            "step": progress.step,
            "epoch": progress.epoch,
            **dict(zip(("loss", "simple", "pruned", "ctc"), values, strict=True)),
            "lr": rate,
            "batch": len(indices),
            "audio_seconds": shares / 25,
        }

    def epoch_batches(self, epoch: int) -> list[batches.Batch]:
        """Returns the batches of an epoch, with indices into ``training``."""
        if self._batches is None or self._batches[0] != epoch:
            seconds = [SLOWEST * u.seconds for u in self.training]
            found = batches.epoch_batches(seconds, self.options.max_duration, self.options.seed, epoch)
            self._batches = epoch, found
        return self._batches[1]

    def _next_batch(self) -> tuple[list[int], float]:
        """Returns (indices of the whole batch, its number of output frames)."""
        progress = self.progress
        found = self.epoch_batches(progress.epoch)
        indices = found[progress.index].indices
        progress.index += 1
        if progress.index == len(found):
            progress.epoch, progress.index = progress.epoch + 1, 0
        frames = sum(len(self._features(i)) for i in indices) / 4
        return indices, frames

    def _draw(self, index: int | str) -> random.Random:
        return random.Random(f"{self.options.seed} {self.progress.step} {index}")

    def _features(self, index: int) -> Tensor:
        features = self.training[index].features
        return features[self._draw(index).randrange(len(features)) if self.options.augment else 0]

    def _inputs(self, indices: list[int]) -> tuple[Tensor, Tensor, list[list[int]], float]:
        """Returns this process's share of the batch: features, lengths, tokens, and a weight, which is 0 if the share
        is empty and 1 otherwise."""
        own = indices[self.world.rank :: self.world.size]
        weight = 1.0 if own else 0.0
        own = own or indices[:1]
        augmented = []
        for index in own:
            features = self._features(index).clone()
            if self.options.augment and self.progress.step >= self.options.mask_after:
                draw = self._draw(f"{index} mask")
                batches.spec_augment(
                    features[None], torch.tensor([len(features)], dtype=torch.int64, device="cpu"), draw
                )
            augmented.append(features)
        x, lengths = batches.collate(augmented)
        device = self.world.device
        return x.to(device), lengths.to(device), [self.tokens[i] for i in own], weight

    @torch.no_grad()
    def _update_average(self) -> None:
        self.progress.averaged += 1
        # at first, the average is over the last quarter of the steps
        weight = max(min(1.0, 4 / self.progress.averaged), 2 / self.options.average_over)
        parameters = [parallel.local(p) for p in self.model.parameters()]
        torch._foreach_lerp_([parallel.local(mean) for mean in self.average], parameters, weight)

    # ----------------------------------------------------------------------- state
    def state(self) -> dict[str, Any]:
        """Returns the content of a checkpoint. All processes must call it."""
        return {
            "model": checkpoints.model_state(self.model),
            "model_avg": checkpoints.model_state(self.model, self.average),
            "optimizer": checkpoints.optimizer_state(self.optimizer),
            "whiten": {n: m.prob for n, m in self.model.named_modules() if type(m).__name__ == "Whiten"},
            "arguments": self.arguments,
            "units": self.units.state_dict(),
            "features": {"rate": speech.RATE, "bins": speech.BINS},
            "options": {name: getattr(self.options, name) for name in Options.FIXED},
            **asdict(self.progress),
        }

    def resume(self, state: dict[str, Any]) -> None:
        for name in Options.FIXED:
            found = state["options"].get(name, getattr(Options, name))  # older checkpoints lack newer options
            if found != getattr(self.options, name):
                raise ValueError(
                    f"{self.options.out} holds a run with {name} {found}, not "
                    f"{getattr(self.options, name)}: give another --out"
                )
        if state["units"] != self.units.state_dict():
            raise ValueError(f"{self.options.out} holds a run with other units: give another --out")
        checkpoints.load_parameters(self.model, state["model"])
        with torch.no_grad():
            for (name, p), mean in zip(self.model.named_parameters(), self.average, strict=True):
                mean.copy_(parallel.like(state["model_avg"][name], p))
        checkpoints.load_optimizer(self.optimizer, state["optimizer"])
        for name, module in self.model.named_modules():
            if name in state["whiten"]:
                module.prob = state["whiten"][name]
        self.progress = Progress(**{name: state[name] for name in asdict(Progress())})
        self.say(f"going on after step {self.progress.step}")

    # ----------------------------------------------------------------------- held-out
    @torch.no_grad()
    def evaluate(self) -> Any:
        """Returns the error rates of the averaged model, which streams with its own chunk size on the first process."""
        state = checkpoints.model_state(self.model, self.average)
        if not self.world.first:
            return None
        model = sizes.build(sizes.streaming(self.arguments)).eval()
        model.load_state_dict({name: tensor.cpu() for name, tensor in state.items()}, strict=True)
        greedy, ctc = [], []
        for first in range(0, len(self.held_out), 16):
            group = self.held_out[first : first + 16]
            x, lengths = batches.collate([u.features[0] for u in group])
            y, y_lens = decoding.encode(model, x, lengths)
            greedy += decoding.greedy_search(model, y, y_lens).tokens
            ctc += decoding.ctc_greedy_search(model.ctc_output(y), y_lens).tokens
        references = [u.text for u in self.held_out]
        texts = [self.units.decode(tokens) for tokens in greedy]
        result: dict[str, Any] = dict(scoring.rates(references, texts))
        result |= {
            f"ctc_{k}": v for k, v in scoring.rates(references, [self.units.decode(t) for t in ctc]).items()
        }
        result["examples"] = list(zip(references, texts, strict=True))[:5]
        return result

    def _report(self, result: dict[str, Any]) -> None:
        report = {
            "encoder": self.options.encoder,
            "step": self.progress.step,
            "epoch": self.progress.epoch,
            "minutes": self.progress.seconds / 60,
            "parameters": sizes.parameters_of(self.model),
            "training_utterances": len(self.training),
            "held_out_utterances": len(self.held_out),
            "threads": torch.get_num_threads(),
            "processes": self.world.size,
            "torch": torch.__version__,
            "scores": [*self.progress.scores, [self.progress.step, result["cer"], result["wer"]]],
            "held_out": result,
        }
        path = Path(self.options.out) / "report.json"
        files.write(path, json.dumps(report, indent=2) + "\n")


def _optimizer(encoder: str, model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
    """Returns ScaledAdam for the Zipformer and AdamW for encoders with LayerNorm, as upstream trains them."""
    if encoder == sizes.ZIPFORMER:
        return ScaledAdam(model.parameters(), lr=lr)
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)


def learn_units(kind: str, training: list[speech.Utterance]) -> Units:
    """Learns units from the training transcripts and the letters of the alphabet."""
    texts = [u.text for u in training]
    alphabet = "abcdefghijklmnopqrstuvwxyz' "
    return Units.learn(kind, [*texts, alphabet] if kind == "char" else texts)
