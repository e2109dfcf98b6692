# SPDX-License-Identifier: Apache-2.0
"""Recordings with transcripts, from Debian's telephone prompts or the user's folder, and their features.

Features are log-mel filterbanks of kaldi-native-fbank at the recordings' own rate. The prompts have 8 kHz, for which
fewer than 80 bins suffice.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from fastasr.audio import features, recordings
from fastasr.audio.features import resample

RATE = 8000
BINS = 40
HIGH_FREQ = -200.0  # Hz relative to the Nyquist frequency
SHORTEST, LONGEST = 0.4, 20.0  # seconds
HELD_OUT = 10  # one prompt in ten is held out, chosen by a hash of its name
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_LETTERS = re.compile(r"^[a-z' ]+$")


class NoSpeech(ValueError):
    """Raised if there are no recordings to train with; the message gives the reason."""


@dataclass
class Utterance:
    """A recording: its name, its features (frames, bins) at several speeds, and its words."""

    name: str
    features: list[torch.Tensor]
    text: str

    @property
    def seconds(self):
        return len(self.features[0]) / 100


def plain_text(text):
    """Returns the text in lower-case letters and apostrophes, with digits as words; None if this would differ from the
    spoken words."""
    text = text.lower().replace("’", "'")
    text = re.sub(r"\[.*?\]", " ", text)  # a prompt's name of a sign, such as [pound]
    text = re.sub(r"\d", lambda digit: f" {DIGITS[int(digit[0])]} ", text)
    text = " ".join(re.sub(r"[,.?!:;\"\-]", " ", text).split())
    return text if _LETTERS.match(text) else None


def read_wav(path):
    """Reads a recording as a Clip. Raises ValueError if the file is not a recording or is empty."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    clip = recordings.read(path)
    if clip.rate <= 0 or len(clip.samples) < clip.rate * 0.03:
        raise ValueError(f"{path}: the recording is empty ({len(clip.samples)} samples at {clip.rate} Hz)")
    return clip


def fbank(samples, rate=RATE, bins=BINS):
    """Returns the recipe's features (frames, bins) of a recording."""
    return features.fbank(samples, rate, bins, HIGH_FREQ)


def features_of_stream(rate=RATE, bins=BINS):
    """Returns an FbankStream, which computes the recipe's features of samples as they arrive."""
    return features.FbankStream(rate, bins, HIGH_FREQ)


def load(cache, folder=None, speeds=(1.0, 0.9, 1.1), say=print, limit=None, features=fbank):
    """Returns (training utterances, held-out utterances). ``cache`` keeps the downloaded prompts. ``features`` makes
    (frames, bins) of samples at RATE.

    A hash of the name decides which prompts are held out, and the training set has no prompt with the same words.
    ``say`` gets one line about the recordings that are left out and why. Raises NoSpeech if none remain.
    """
    clips = _clips(cache, folder, say)[:limit]
    found, unusable = [], {}
    for clip in clips:
        reason = _why_unusable(clip)
        if reason:
            unusable.setdefault(reason, []).append(clip.name)
        else:
            found.append((clip, plain_text(clip.text)))
    if unusable:
        say("left out: " + "; ".join(f"{_named(names)} {reason}" for reason, names in unusable.items()))
    if not found:
        raise NoSpeech("no recording has a transcript of letters and lasts 0.4 to 20 seconds")
    held = {clip.name for clip, _ in found if _hash(clip.name) % HELD_OUT == 0} or {found[0][0].name}
    held_texts = {text for clip, text in found if clip.name in held}
    training, held_out = [], []
    for clip, text in found:
        if clip.name in held:
            held_out.append(_utterance(clip, text, (1.0,), features))
        elif text not in held_texts:
            training.append(_utterance(clip, text, speeds, features))
    if not training:
        raise NoSpeech(f"{len(found)} recordings are too few to hold some out")
    return training, held_out


def _why_unusable(clip):
    """Returns why a recording cannot be used for training; "" if it can."""
    if not (clip.text or "").strip():
        return "without a transcript"
    if plain_text(clip.text) is None:
        return "whose transcript is not of letters and digits"
    return "" if SHORTEST <= clip.seconds <= LONGEST else f"not of {SHORTEST:g} to {LONGEST:g} s"


def _named(names):
    return names[0] if len(names) == 1 else f"{len(names)} ({names[0]}, ...)"


def _clips(cache, folder, say):
    if folder is not None:
        try:
            return recordings.from_folder(Path(folder), say)
        except recordings.NoAudio as error:
            raise NoSpeech(str(error).replace("--audio", "--speech")) from None
    reason = recordings.fetch_prompts(Path(cache), say)
    if reason:
        raise NoSpeech(f"the prompts cannot be fetched here: {reason}; use --speech FOLDER")
    words = recordings.prompt_transcripts(Path(cache))
    root, clips = Path(cache) / recordings.PROMPTS, []
    for path in sorted(root.rglob("*.wav")):
        name = path.relative_to(root).with_suffix("").as_posix()
        if name in words:
            clip = recordings.read(path)
            clip.name, clip.text = name, words[name]
            clips.append(clip)
    return clips


def _utterance(clip, text, speeds, features):
    samples = resample(clip.samples, clip.rate, RATE)
    # Faster speech has fewer samples at the same rate.
    versions = [
        samples if s == 1.0 else resample(samples, round(RATE * s / 100), RATE // 100) for s in speeds
    ]
    return Utterance(clip.name, [features(version) for version in versions], text)


def _hash(name):
    import zlib

    return zlib.crc32(name.encode())
