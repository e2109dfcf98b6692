# SPDX-License-Identifier: Apache-2.0
"""Recordings with transcripts, from Debian's telephone prompts or the user's own, and their features.

Features are log-mel filterbanks of kaldi-native-fbank at the recordings' own rate. The prompts have 8 kHz, for which
fewer than 80 bins suffice.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastasr.asr.audio import features, recordings
from fastasr.asr.audio.features import resample
from fastasr.asr.recipe import listings
from fastasr.asr.recipe.listings import NoSpeech

RATE = 8000
BINS = 40
HIGH_FREQ = -200.0  # Hz relative to the Nyquist frequency
SHORTEST, LONGEST = 0.4, 20.0  # seconds; silence follows shorter recordings
TOO_LONG = f"longer than {LONGEST:g} s"
HELD_OUT = 10  # one recording in ten is held out, chosen by a hash of its name
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_LETTERS = re.compile(r"^[a-z' ]+$")


@dataclass
class Utterance:
    """A recording: its name, its features (frames, bins) at several speeds, and its words."""

    name: str
    features: list[torch.Tensor]
    text: str

    @property
    def seconds(self) -> float:
        return len(self.features[0]) / 100


def plain_text(text: str) -> str | None:
    """Returns the text in lower-case letters and apostrophes, with digits as words; None if this would differ from the
    spoken words."""
    text = text.lower().replace("’", "'")
    text = re.sub(r"\[.*?\]", " ", text)  # a prompt's name of a sign, such as [pound]
    text = re.sub(r"\d", lambda digit: f" {DIGITS[int(digit[0])]} ", text)
    text = " ".join(re.sub(r"[,.?!:;\"\-]", " ", text).split())
    return text if _LETTERS.match(text) else None


def read_wav(path: Path | str) -> recordings.Clip:
    """Reads a recording as a Clip. Raises ValueError if the file is not a recording or is empty."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    clip = recordings.read(path)
    if len(clip.samples) < clip.rate * 0.03:
        raise ValueError(f"{path}: the recording is empty ({len(clip.samples)} samples at {clip.rate} Hz)")
    return clip


def fbank(samples: Tensor, rate: int = RATE, bins: int = BINS) -> Tensor:
    """Returns the recipe's features (frames, bins) of a recording."""
    return features.fbank(samples, rate, bins, HIGH_FREQ)


def features_of_stream(rate: int = RATE, bins: int = BINS) -> features.FbankStream:
    """Returns an FbankStream, which computes the recipe's features of samples as they arrive."""
    return features.FbankStream(rate, bins, HIGH_FREQ)


def load(
    cache: Path | str,
    folder: Path | str | None = None,
    speeds: Sequence[float] = (1.0, 0.9, 1.1),
    say: Callable[[str], None] = print,
    limit: int | None = None,
    features: Callable = fbank,
    held_out: Any = None,
) -> tuple[list[Utterance], list[Utterance]]:
    """Returns (training utterances, held-out utterances).

    Args:
        cache: keeps the downloaded prompts.
        folder: a folder or manifest for ``listings.entries``; None: the prompts.
        speeds: the speeds of the training utterances.
        say: gets lines about the recordings that are left out or padded, with the reason, or held out.
        limit: the most recordings to use.
        features: makes (frames, bins) of samples at RATE.
        held_out: the share of recordings to hold out, as a number or its text; or the path of another folder or
            manifest, all of which is held out. None: about one in HELD_OUT.

    A hash of the name decides which recordings are held out, and the training set has none with the same words. If most
    texts repeat, all recordings of some speakers are held out instead, or, where neither a manifest nor the names tell
    speakers, some recordings. Raises NoSpeech if none remain.
    """
    share, other = _share(held_out)
    found = _usable(_clips(cache, folder, say)[:limit], say)
    if other is None:
        training, held = _split(found, share, say)
    else:
        with _errors_name("--held-out"):
            training, held = found, _usable(_listed(other, say), say)
        trained = {text for _, text in training}
        shared = sum(text in trained for _, text in held)
        say(f"held out: {len(held)} recordings of {other}, {shared} of them with texts that are trained too")
    if not training:
        raise NoSpeech(f"{len(found)} recordings are too few to hold some out")
    return (
        [_utterance(clip, text, speeds, features) for clip, text in training],
        [_utterance(clip, text, (1.0,), features) for clip, text in held],
    )


def unheard(
    cache: Path | str,
    folder: Path | str | None = None,
    speeds: Sequence[float] = (1.0,),
    say: Callable[[str], None] = print,
    features: Callable = fbank,
) -> list[Utterance]:
    """Returns the utterances, at each of the speeds, that ``load`` with these recordings never trains on: those that it
    holds out, and those that are longer than LONGEST. ``say`` gets a line about those left out."""
    clips = _clips(cache, folder, say)
    long = [(clip, plain_text(clip.text)) for clip in clips if _why_unusable(clip) == TOO_LONG]
    _, held = _split(_usable(clips, say), None, say)
    return [_utterance(clip, text, speeds, features) for clip, text in [*held, *long]]


def _share(held_out: Any) -> tuple[float | None, Path | None]:
    """Returns the share of recordings to hold out, or None, and the path of held-out recordings, or None."""
    if held_out is None:
        return None, None
    try:
        share = float(str(held_out))
    except ValueError:
        return None, Path(held_out)
    if not 0 < share < 1:
        raise ValueError(f"--held-out: expected a share between 0 and 1 or a folder, got {held_out}")
    return share, None


def _usable(clips: list[recordings.Clip], say: Callable[[str], None]) -> list:
    """Returns [(clip, plain text)] of the recordings that can be used for training, none of them too short."""
    unusable: dict[str, list[str]] = {}
    found, padded = [], []
    for clip in clips:
        reason = _why_unusable(clip)
        if reason:
            unusable.setdefault(reason, []).append(clip.name)
            continue
        missing = round(SHORTEST * clip.rate) - len(clip.samples)
        if missing > 0:
            padded.append(clip.name)
            clip.samples = torch.nn.functional.pad(clip.samples, (0, missing))
        found.append((clip, plain_text(clip.text)))
    if unusable:
        say("left out: " + "; ".join(f"{_named(names)} {reason}" for reason, names in unusable.items()))
    if padded:
        say(f"with silence to {SHORTEST:g} s: {_named(padded)}")
    if not found:
        raise NoSpeech(f"no recording has a transcript of letters and lasts up to {LONGEST:g} seconds")
    return found


def _split(found: list, share: float | None, say: Callable[[str], None]) -> tuple[list, list]:
    """Splits [(clip, text)] into training and held-out recordings."""

    def is_held(name: str) -> bool:
        return _hash(name) % 10_000 < 10_000 * share if share else _hash(name) % HELD_OUT == 0

    texts = {text for _, text in found}
    if 2 * len(texts) > len(found):
        held = [pair for pair in found if is_held(pair[0].name)] or found[:1]
        heard = {text for _, text in held}
        return [pair for pair in found if pair[1] not in heard], held
    speakers = _speakers([clip for clip, _ in found], [text for _, text in found])
    owners = speakers or [clip.name for clip, _ in found]
    wanted, chosen, count = (share or 1 / HELD_OUT) * len(found), set(), 0
    for owner in sorted(set(owners), key=_hash)[:-1]:  # one remains to train with
        if count >= wanted:
            break
        chosen.add(owner)
        count += owners.count(owner)
    whose = f" of {', '.join(sorted(chosen))}" if speakers else ", chosen by their names"
    say(
        f"texts repeat ({len(texts)} different texts in {len(found)} recordings), so held-out texts are trained too; "
        f"held out: {count} recordings{whose}"
    )
    training: list = []
    held = []
    for pair, owner in zip(found, owners, strict=True):
        (held if owner in chosen else training).append(pair)
    return training, held


def _speakers(clips: list[recordings.Clip], texts: Sequence[str]) -> list[str]:
    """Returns each recording's speaker by the manifest or, if it names none, by the names; [] if neither tells.

    Names tell a speaker if they have equally many parts between "_", "-" and "/", and one of these parts is shared by
    recordings of different texts, while a text has several of them: "7_jackson_32", "jackson/7", "7/0a7c_nohash_0".
    """
    if all(clip.speaker for clip in clips):
        return [clip.speaker for clip in clips]
    names = [re.split("[_/-]", clip.name) for clip in clips]
    for parts in zip(*names, strict=True) if len(set(map(len, names))) == 1 else ():
        pairs = set(zip(parts, texts, strict=True))
        speakers = len(set(parts))
        if 1 < speakers <= len(clips) / 2 and len(pairs) >= 2 * max(speakers, len(set(texts))):
            return list(parts)
    return []


def _why_unusable(clip: recordings.Clip) -> str:
    """Returns why a recording cannot be used for training; "" if it can."""
    if not (clip.text or "").strip():
        return "without a transcript"
    if plain_text(clip.text) is None:
        return "whose transcript is not of letters and digits"
    if not len(clip.samples):
        return "without samples"
    return "" if clip.seconds <= LONGEST else TOO_LONG


def _named(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} ({names[0]}, ...)"


def _clips(cache: Path | str, folder: Path | str | None, say: Callable[[str], None]) -> list:
    if folder is not None:
        with _errors_name("--speech"):
            return _listed(Path(folder), say)
    reason = recordings.fetch_prompts(Path(cache), say)
    if reason:
        raise NoSpeech(f"the prompts cannot be fetched here: {reason}; use --speech FOLDER")
    return list(recordings.prompts(Path(cache)))


@contextmanager
def _errors_name(option: str) -> Iterator[None]:
    """Inside the block errors about recordings begin with the option that gave them."""
    try:
        yield
    except ValueError as error:
        kind = NoSpeech if isinstance(error, NoSpeech) else ValueError
        raise kind(f"{option}: {error}") from None


def _listed(source: Path, say: Callable[[str], None]) -> list:
    """Reads the recordings that ``listings.entries`` returns."""
    clips, whole = [], None
    for entry in listings.entries(source):
        try:
            # a manifest lists the parts of a file one after the other
            if whole is None or whole[0] != entry.path:
                whole = entry.path, recordings.read(entry.path)
        except ValueError as error:
            say(f"left out: {error}")
            continue
        samples, rate = whole[1].samples, whole[1].rate
        begin = round(entry.begin * rate)
        end = len(samples) if entry.seconds is None else begin + round(entry.seconds * rate)
        clips.append(recordings.Clip(entry.name, samples[begin:end], rate, entry.text, entry.speaker))
    if not clips:
        raise NoSpeech(f"no recording of {source} can be read")
    return clips


def _utterance(clip: recordings.Clip, text: str, speeds: Sequence[float], features: Callable) -> Utterance:
    samples = resample(clip.samples, clip.rate, RATE)
    # Faster speech has fewer samples at the same rate.
    versions = [
        samples if s == 1.0 else resample(samples, round(RATE * s / 100), RATE // 100) for s in speeds
    ]
    return Utterance(clip.name, [features(version) for version in versions], text)


def _hash(name: str) -> int:
    import zlib

    return zlib.crc32(name.encode())
