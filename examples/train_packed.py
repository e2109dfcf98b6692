# SPDX-License-Identifier: Apache-2.0
"""Train a small ParakeetForTDT of transformers on packed batches: the loader, the encoder and the loss pad nothing.

    python examples/train_packed.py [--speech FOLDER] [--seconds 60] [--recordings 32] [--steps 60]

Batches hold at most ``--seconds`` of speech, of any lengths: Lhotse's DynamicBucketingSampler draws them, or the
example itself if Lhotse is not installed. The same batches train the same model, without dropout, three times:

    padded      the encoder computes the padding, and its BatchNorm's statistics include it
    ragged      the batches are padded, and the encoder leaves the padding out
    packed      nothing is padded; on a GPU one recording of the encoder serves every batch

The losses of the last two are equal but for rounding. ``--speech`` is a folder of recordings with a .txt beside each;
without it Debian's telephone prompts are downloaded.
"""

import argparse
import importlib.util
import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import ParakeetForTDT, ParakeetTDTConfig

import fastasr
from fastasr.asr.recipe import speech
from fastasr.asr.recipe.units import Units
from fastasr.rnnt import tdt_joiner_loss

FACTOR = 4  # The encoder's frames are 40 ms: telephone prompts have up to 20 characters a second.
WARM = 5  # steps before the time is taken: the first calls run unrecorded, and the third is recorded
ENCODER = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "num_mel_bins": speech.BINS,
    "subsampling_factor": FACTOR,
    "subsampling_conv_channels": 32,
    **dict.fromkeys(("dropout", "activation_dropout", "attention_dropout", "layerdrop"), 0.0),
}


def build(tokens: int) -> ParakeetForTDT:
    """Returns a model whose padding is token 0 and whose blank is the last token."""
    sizes = {"decoder_hidden_size": 96, "num_decoder_layers": 1, "pad_token_id": 0}
    return ParakeetForTDT(
        ParakeetTDTConfig(vocab_size=tokens + 1, blank_token_id=tokens, encoder_config=ENCODER, **sizes)
    )


def drawn(seconds: list[float], most: float, recordings: int, seed: int) -> Iterator[list[int]]:
    """Yields batches without end: indices of recordings that last ``most`` seconds together, or less."""
    for epoch in itertools.count():
        if importlib.util.find_spec("lhotse"):
            yield from by_lhotse(seconds, most, recordings, seed, epoch)
            continue
        batch: list[int] = []
        for i in random.Random(f"{seed} {epoch}").sample(range(len(seconds)), len(seconds)):
            if batch and (len(batch) == recordings or sum(seconds[j] for j in (*batch, i)) > most):
                yield batch
                batch = []
            batch.append(i)
        yield batch


def by_lhotse(
    seconds: list[float], most: float, recordings: int, seed: int, epoch: int
) -> Iterator[list[int]]:
    """Yields the batches of an epoch. ``concatenate_cuts`` has Lhotse add up durations; it would count the padding
    otherwise. It stops behind the recording that exceeds the limit."""
    from lhotse import CutSet, MonoCut
    from lhotse.dataset import DynamicBucketingSampler
    from lhotse.dataset.sampling.base import TimeConstraint

    cuts = CutSet.from_cuts(MonoCut(str(i), start=0, duration=s, channel=0) for i, s in enumerate(seconds))
    limit = TimeConstraint(most - max(seconds), max_cuts=recordings, concatenate_cuts=True)
    sampler = DynamicBucketingSampler(cuts, constraint=limit, num_buckets=2, shuffle=True, seed=seed)
    sampler.set_epoch(epoch)
    for batch in sampler:
        yield [int(cut.id) for cut in batch]


def loss_of_padded(model: ParakeetForTDT, features: list[torch.Tensor], texts: dict) -> torch.Tensor:
    x = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
    lengths = torch.tensor([len(each) for each in features], device=x.device)
    mask = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return model(input_features=x, attention_mask=mask, **texts).loss


def loss_of_packed(model: ParakeetForTDT, features: list[torch.Tensor], texts: dict) -> torch.Tensor:
    lengths = torch.tensor([len(each) for each in features])  # on the host, which knows them without waiting
    batch = fastasr.PackedFrames(torch.cat(features), lengths)
    hidden = model.encoder(input_features=batch).last_hidden_state
    labels, config, head = texts["labels"], model.config, model.joint.head
    return tdt_joiner_loss(
        hidden._replace(frames=model.encoder_projector(hidden.frames)),
        model.decoder(texts["decoder_input_ids"], cache=None),
        head.weight,
        head.bias,
        labels,
        None,
        (labels != config.pad_token_id).sum(1),
        config.blank_token_id,
        config.durations,
        longest=-(-int(lengths.max()) // FACTOR),
    )


def train(way: str, utterances: list, units: Units, options: argparse.Namespace) -> list[float]:
    """Trains once, prints a line, and returns the losses of the steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(options.seed)
    model = build(len(units)).to(device).train()
    frames = [len(each.features[0]) for each in utterances]
    room = fastasr.Graphs(
        frames=round(100 * options.seconds), recordings=options.recordings, longest=max(frames)
    )
    graphs = room if way == "packed" else False
    report = fastasr.accelerate(model, ragged=way != "padded", graphs=graphs)
    if (reason := (report.graphs or {}).get("encoder")) is not None:
        print(f"packed: not recorded, because {reason}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate)
    batches = drawn([n / 100 for n in frames], options.seconds, options.recordings, options.seed)
    loss_of = loss_of_packed if way == "packed" else loss_of_padded
    losses, padded, spoken, begun = [], 0, 0, time.perf_counter()
    for step, batch in enumerate(itertools.islice(batches, options.steps)):
        if step == WARM:
            losses[-1].item()  # waits for a GPU
            padded, spoken, begun = 0, 0, time.perf_counter()
        features = [utterances[i].features[0].to(device) for i in batch]
        labels = [torch.tensor(units.encode(utterances[i].text)) for i in batch]
        labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True).to(device)
        contexts = torch.nn.functional.pad(labels, (1, 0), value=len(units))
        loss = loss_of(model, features, {"labels": labels, "decoder_input_ids": contexts})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        lengths = [len(each) for each in features]
        padded, spoken = padded + len(lengths) * max(lengths), spoken + sum(lengths)
    found = torch.stack(losses).tolist()
    seconds = time.perf_counter() - begun
    kinds = fastasr.graph_state(model).get("encoder", [])
    filled = [kind.filling for kind in kinds if kind.filling is not None] or [1.0]
    filling = spoken / padded if way == "padded" else filled[0]
    print(
        f"{way}: loss {found[0]:.4f} to {found[-1]:.4f}, {spoken / 100 / seconds:.0f} s of speech per second, "
        f"the encoder computes {1 - filling:.0%} padding, recorded {sum(kind.recorded for kind in kinds)} times"
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--speech", type=Path, help="recordings with transcripts, instead of the prompts")
    parser.add_argument(
        "--cache", type=Path, default=Path("demo/cache"), help="downloads (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="the most speech in a batch")
    parser.add_argument("--recordings", type=int, default=32, help="the most recordings in a batch")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=1e-3, help="the learning rate")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    utterances, _ = speech.load(options.cache, options.speech, speeds=(1.0,))
    longest = max(each.seconds for each in utterances)
    if options.seconds < 2 * longest:
        parser.error(f"--seconds: expected at least {2 * longest:g}, twice the longest recording")
    units = Units.learn("char", [each.text for each in utterances])
    losses = {way: train(way, utterances, units, options) for way in ("padded", "ragged", "packed")}
    apart = [abs(a / b - 1) for a, b in zip(losses["packed"], losses["ragged"], strict=True)]
    print(f"packed and ragged: losses at most {max(apart):.1e} apart")


if __name__ == "__main__":
    main()
