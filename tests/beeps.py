# SPDX-License-Identifier: Apache-2.0
"""Recordings that a tiny model can learn: every letter is a tone."""

import math
import random
import wave

import torch

TONES = {"a": 400, "b": 700, "c": 1100, "d": 1700}


def samples(text, rate=8000, seconds=0.15):
    t = torch.arange(round(seconds * rate)) / rate
    parts = [0.4 * torch.sin(2 * math.pi * TONES.get(c, 0) * t) for c in text]
    signal = torch.cat(parts)
    return signal + 0.003 * torch.randn(len(signal), generator=torch.Generator().manual_seed(len(text)))


def write_wav(path, signal, rate=8000, channels=1):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        pcm = (signal.clamp(-1, 1) * 32767).to(torch.int16)
        file.writeframes(pcm.repeat_interleave(channels).numpy().tobytes())


def folder(path, count=24):
    """Writes recordings of random letters with their transcripts."""
    draw = random.Random(0)
    path.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        text = "".join(draw.choice("abcd ") for _ in range(draw.randint(5, 9))).strip() or "ab"
        text = " ".join(text.split())
        write_wav(path / f"beeps-{index}.wav", samples(text))
        (path / f"beeps-{index}.txt").write_text(text)
    return path
