# SPDX-License-Identifier: Apache-2.0
"""Recorded speech: the user's folder, Debian's telephone prompts, or a generated signal.

The prompts are the packages asterisk-core-sounds-en-wav (one professional voice, 8 kHz, CC-BY-SA 3.0) and
asterisk-core-sounds-en (their transcripts). ``apt-get download`` and ``dpkg -x`` need no root.
"""

import gzip
import math
import os
import random
import shutil
import subprocess
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

PACKAGES = ("asterisk-core-sounds-en-wav", "asterisk-core-sounds-en")
PROMPTS = "usr/share/asterisk/sounds/en_US_f_Allison"
TRANSCRIPTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
RATES = range(1000, 1_000_001)  # Hz; any other rate means a damaged header
BLOCK = 1 << 20  # samples of all channels that are read at once
GAP_SECONDS = 0.3  # between two recordings of one utterance
DOWNLOAD_TIMEOUT = 90  # seconds

Say = Callable[[str], None]


class NoAudio(Exception):
    """Raised if the user's folder has no usable recording."""


@dataclass
class Clip:
    """A recording: samples in [-1, 1], the rate in Hz, and the transcript and the speaker, if they are known."""

    name: str
    samples: torch.Tensor
    rate: int
    text: str = ""
    speaker: str = ""

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate


@dataclass
class Speech:
    """Utterances of one rate, and a description of their source."""

    source: str
    rate: int
    utterances: list[Clip] = field(default_factory=list)


# --- reading


def read(path: Path) -> Clip:
    """Reads the first channel of a recording. Raises ``ValueError`` with the reason if this fails, if there are no
    samples or some that are not finite, or if the rate is not in RATES. Memory is in proportion to the samples that are
    there, whatever the header says.
    """
    try:
        samples, rate = _read_pcm16(path) if path.suffix.lower() == ".wav" else _read_soundfile(path)
    except (OSError, EOFError, wave.Error, RuntimeError, ImportError) as error:
        raise ValueError(f"{path.name}: {str(error) or 'it ends too early'}") from None
    if not len(samples):
        raise ValueError(f"{path.name}: the recording is empty (0 samples at {rate} Hz)")
    if rate not in RATES:
        raise ValueError(f"{path.name}: expected a rate of {RATES.start} to {RATES.stop - 1} Hz, got {rate}")
    if not bool(samples.isfinite().all()):
        raise ValueError(f"{path.name}: it has samples that are not finite")
    return Clip(path.stem, samples, rate)


def _read_pcm16(path: Path) -> tuple[torch.Tensor, int]:
    try:
        with wave.open(str(path)) as file:
            if file.getsampwidth() == 2:
                channels, rate = file.getnchannels(), file.getframerate()
                # A header may promise more frames than there are, and readframes allocates memory for all.
                most = path.stat().st_size // (2 * channels)
                data = bytearray(file.readframes(min(most, file.getnframes())))
                del data[len(data) - len(data) % (2 * channels) :]
                samples = (
                    torch.frombuffer(data, dtype=torch.int16)
                    if data
                    else torch.zeros(0, dtype=torch.int16, device="cpu")
                )
                return samples.reshape(-1, channels)[:, 0].float() / 32768, rate
    except wave.Error:
        pass  # not plain PCM; soundfile reads more formats
    return _read_soundfile(path)


def _read_soundfile(path: Path) -> tuple[torch.Tensor, int]:
    try:
        import soundfile
    except ImportError:
        raise ImportError("needs soundfile: pip install 'fastasr[asr]'") from None
    parts = [torch.zeros(0, dtype=torch.float32, device="cpu")]
    with soundfile.SoundFile(str(path)) as file:
        count = max(1, BLOCK // file.channels)
        while len(block := file.read(count, dtype="float32", always_2d=True)):
            parts.append(torch.from_numpy(block[:, 0].copy()))
        return torch.cat(parts), file.samplerate


def from_folder(folder: Path, say: Say) -> list[Clip]:
    """Reads all recordings below ``folder``. A text file of the same name is the transcript. Raises ``NoAudio`` if
    there is no usable recording.
    """
    if not folder.is_dir():
        raise NoAudio(f"--audio: {folder} is no folder")
    clips = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES):
        try:
            clip = read(path)
        except ValueError as error:
            say(f"left out: {error}")
            continue
        if clip.seconds < 0.2:
            continue
        words = path.with_suffix(".txt")
        clip.text = words.read_text(encoding="utf-8").strip() if words.exists() else ""
        clips.append(clip)
    if not clips:
        raise NoAudio(f"--audio: no recording ({', '.join(SUFFIXES)}) in {folder} can be read")
    return clips


# --- Debian's prompts


def _apt(cache: Path, *arguments: str) -> str:
    """Runs apt-get in ``cache``. Returns "", or its last line of output if it fails."""
    try:
        done = subprocess.run(
            ["apt-get", "-q", *arguments],
            cwd=cache,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT,
            env=dict(os.environ, LC_ALL="C", DEBIAN_FRONTEND="noninteractive"),
        )
    except subprocess.TimeoutExpired:
        return f"apt-get took longer than {DOWNLOAD_TIMEOUT} s"
    except OSError as error:
        return f"apt-get cannot be run: {error}"
    if done.returncode == 0:
        return ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("E:")]
    return (errors or done.stderr.splitlines() or ["apt-get failed"])[-1].removeprefix("E:").strip()


def fetch_prompts(cache: Path, say: Say) -> str:
    """Downloads and unpacks the prompts into ``cache`` unless they are there. Returns "" or the reason of a failure."""
    if any((cache / PROMPTS).glob("*.wav")):
        return ""
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            return f"there is no {tool} on this system"
    cache.mkdir(parents=True, exist_ok=True)
    say(f"apt-get download {' '.join(PACKAGES)} (18 MB) into {cache}")
    reason = _apt(cache, "download", *PACKAGES)
    if reason and os.geteuid() == 0:
        say(f"{reason}; trying apt-get update first")
        reason = _apt(cache, "update") or _apt(cache, "download", *PACKAGES)
    if reason:
        return reason
    for package in PACKAGES:
        archives = sorted(cache.glob(f"{package}_*.deb"))
        if not archives:
            return f"apt-get left no archive of {package}"
        done = subprocess.run(
            ["dpkg", "-x", str(archives[-1]), str(cache)],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT,
        )
        if done.returncode != 0:
            return f"dpkg -x failed: {done.stderr.strip()}"
    return "" if any((cache / PROMPTS).glob("*.wav")) else "the packages hold no prompts"


def transcripts(text: str) -> dict[str, str]:
    """Returns {name: words} from lines ``name: words``, without comments and sounds in square brackets."""
    found = {}
    for line in text.splitlines():
        name, colon, words = line.partition(":")
        if colon and not line.startswith(";") and (words := words.strip()) and not words.startswith("["):
            found[name.strip()] = words
    return found


def prompt_transcripts(cache: Path) -> dict[str, str]:
    """Returns {name: words} for the prompts that ``fetch_prompts`` has unpacked into ``cache``."""
    return transcripts(gzip.decompress((cache / TRANSCRIPTS).read_bytes()).decode("utf-8", "replace"))


def prompts(cache: Path, pattern: str = "**/*.wav") -> Iterator[Clip]:
    """Yields the unpacked prompts that fit the pattern and have a transcript, named by their paths."""
    words, root = prompt_transcripts(cache), cache / PROMPTS
    for path in sorted(root.glob(pattern)):
        name = path.relative_to(root).with_suffix("").as_posix()
        if name in words:
            clip = read(path)
            clip.name, clip.text = name, words[name]
            yield clip


# --- a generated signal


def generated(seconds: float, rate: int, seed: int) -> Clip:
    """Generates a speech-like signal: harmonics of a moving pitch with three moving formants, in syllables and
    pauses."""
    draw = random.Random(seed)
    count = int(seconds * rate)
    t = torch.arange(count, dtype=torch.float32, device="cpu") / rate
    pitch = (
        120 + 25 * torch.sin(2 * math.pi * 0.35 * t + draw.random()) + 8 * torch.sin(2 * math.pi * 2.3 * t)
    )
    phase = torch.cumsum(pitch / rate, 0) * 2 * math.pi
    formants = [
        (base + width * torch.sin(2 * math.pi * speed * t + 6 * draw.random()))
        for base, width, speed in ((550, 220, 1.7), (1500, 450, 1.3), (2600, 300, 0.9))
    ]
    signal = torch.zeros(count, dtype=torch.float32, device="cpu")
    for harmonic in range(1, int(0.9 * rate / 2 / 155)):
        frequency = harmonic * pitch
        gain = sum(torch.exp(-(((frequency - f) / 180) ** 2)) for f in formants) + 0.02
        signal += gain * torch.sin(harmonic * phase) / harmonic**0.5
    envelope = torch.zeros(count, dtype=torch.float32, device="cpu")
    at = 0.1
    while at < seconds:
        length = draw.uniform(0.12, 0.3)
        lower, upper = int(at * rate), min(count, int((at + length) * rate))
        if upper > lower:
            envelope[lower:upper] = torch.hann_window(
                upper - lower, periodic=False, dtype=torch.float32, device="cpu"
            ) * draw.uniform(0.5, 1.0)
        at += length + (draw.uniform(0.25, 0.6) if draw.random() < 0.15 else draw.uniform(0.0, 0.06))
    noise = torch.randn(
        count, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu"
    )
    signal = signal * envelope + 0.003 * noise
    return Clip(f"generated-{seed}", 0.6 * signal / signal.abs().max(), rate, "")


# --- utterances


def joined(clips: list[Clip], seconds: float, count: int, seed: int = 0) -> list[Clip]:
    """Joins clips in a seeded order to ``count`` utterances of at most ``seconds``, with pauses between the clips.

    A clip that is longer than ``seconds`` is cut. Clips of another rate than the first one are left out.
    """
    rate = clips[0].rate
    pool = [clip for clip in clips if clip.rate == rate]
    order = random.Random(seed).sample(pool, len(pool))
    gap = torch.zeros(int(GAP_SECONDS * rate), dtype=torch.float32, device="cpu")
    most, turn = int(seconds * rate), 0
    made = []
    for index in range(count):
        parts: list[Tensor] = []
        names, words, length = [], [], 0
        for _ in range(len(order)):
            clip = order[turn % len(order)]
            added = len(clip.samples) + (len(gap) if parts else 0)
            if length + added > most and parts:
                if most - length < 1.5 * rate:
                    break
                turn += 1  # this clip is too long for the rest; the next one may fit
                continue
            turn += 1
            parts += ([gap] if parts else []) + [clip.samples]
            names.append(clip.name)
            words.append(clip.text)
            length += added
        samples = torch.cat(parts)[:most]
        made.append(
            Clip(f"utterance {index + 1}: {', '.join(names)}", samples, rate, " ".join(filter(None, words)))
        )
    return made


def load(
    folder: Path | None, cache: Path, seconds: float, say: Say, count: int = 4, only_generated: bool = False
) -> Speech:
    """Returns ``count`` utterances of about ``seconds`` from ``folder``, else from Debian's prompts, else generated."""
    if folder is not None:
        clips = from_folder(folder, say)
        utterances = joined(clips, seconds, count)
        return Speech(f"{len(clips)} recordings in {folder}", utterances[0].rate, utterances)
    reason = "asked for" if only_generated else fetch_prompts(cache, say)
    if not reason:
        clips = [clip for clip in prompts(cache, "*.wav") if 1.0 <= clip.seconds <= 12.0]
        if clips:
            source = "telephone prompts of Debian's asterisk-core-sounds-en-wav (Allison Smith, CC-BY-SA 3.0)"
            utterances = joined(clips, seconds, count)
            return Speech(source, utterances[0].rate, utterances)
        reason = "no prompt has a transcript"
    if not only_generated:
        say(f"no recordings to be had here: {reason}")
    say("generating a speech-like signal: harmonics under moving formants, in syllables with pauses")
    rate = 16000
    clips = [generated(seconds - 0.08 * index, rate, seed=index) for index in range(count)]
    return Speech(f"a generated speech-like signal ({reason})", rate, clips)
