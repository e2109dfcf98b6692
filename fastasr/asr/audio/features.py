# SPDX-License-Identifier: Apache-2.0
"""Log-mel filterbanks as Zipformer recipes compute them (kaldi-native-fbank), and resampling."""

import math
from typing import Any

import torch
from torch import Tensor

from fastasr.asr.audio.recordings import Clip

RATE = 16000
HIGH_FREQ = -400.0  # Hz relative to the Nyquist frequency, as in icefall's recipes
WIDTH = 24  # zero crossings of the resampling filter on each side
ROLLOFF = 0.95  # cut-off relative to the lower Nyquist frequency


class FbankStream:
    """Computes log-mel filterbanks of kaldi-native-fbank for a stream: 25 ms windows, centred on frames of 10 ms,
    without dither. It returns every frame once and then drops it, so an endless stream needs no more memory than a
    short one.
    """

    def __init__(self, rate: int | None = RATE, bins: int = 80, high_freq: float = HIGH_FREQ) -> None:
        try:
            import kaldi_native_fbank
        except ImportError as error:
            raise ImportError(
                "features need kaldi-native-fbank: pip install 'fastasr[asr]', or give step() features"
            ) from error
        options = kaldi_native_fbank.FbankOptions()
        options.frame_opts.samp_freq = rate
        options.frame_opts.dither = 0.0
        options.frame_opts.snip_edges = False
        options.mel_opts.num_bins = bins
        options.mel_opts.high_freq = high_freq
        self._computer = kaldi_native_fbank.OnlineFbank(options)
        self._rate, self._bins, self._given = rate, bins, 0

    def accept(self, samples: Any) -> Tensor:
        """Returns the frames (n, bins) that these samples, floats in [-1, 1], complete."""
        self._computer.accept_waveform(self._rate, samples.tolist())
        return self._new()

    def finish(self) -> Tensor:
        """Returns the last frames, whose windows reach beyond the end."""
        self._computer.input_finished()
        return self._new()

    def _new(self) -> Tensor:
        ready = self._computer.num_frames_ready
        frames = [torch.from_numpy(self._computer.get_frame(i).copy()) for i in range(self._given, ready)]
        self._computer.pop(ready - self._given)
        self._given = ready
        return (
            torch.stack(frames) if frames else torch.zeros(0, self._bins, dtype=torch.float32, device="cpu")
        )


def fbank(samples: Any, rate: int | None = RATE, bins: int = 80, high_freq: float = HIGH_FREQ) -> Tensor:
    """Returns the features (frames, bins) of a whole recording."""
    stream = FbankStream(rate, bins, high_freq)
    return torch.cat([stream.accept(samples), stream.finish()])


def batch(clips: list[Clip]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns features ``[B, T, 80]``, padded with the floor of the logarithm as recipes do, and their lengths."""
    features = [fbank(resample(clip.samples, clip.rate)) for clip in clips]
    padded = torch.nn.utils.rnn.pad_sequence(features, batch_first=True, padding_value=math.log(1e-10))
    return padded, torch.tensor([len(f) for f in features], dtype=torch.int64, device="cpu")


def resample(samples: torch.Tensor, rate: int, wanted: int = RATE) -> torch.Tensor:
    """Resamples from ``rate`` to ``wanted`` Hz with a Hann-windowed sinc in ``wanted / gcd`` phases.

    Output sample ``m`` is the sum over ``n`` of x[n] h(m / wanted - n / rate), h(t) = c sinc(c t) hann(t) / rate, with
    the cut-off c at ``ROLLOFF`` of the lower rate. The output has ceil(len * wanted / rate) samples. A recording of
    8 kHz has no energy above 4 kHz after resampling either; its upper mel bins hold the floor of the logarithm.
    """
    if rate == wanted:
        return samples
    divisor = math.gcd(rate, wanted)
    down, up = rate // divisor, wanted // divisor
    cutoff = ROLLOFF * min(rate, wanted)
    reach = math.ceil(WIDTH * rate / cutoff)  # input samples on each side
    taps = torch.arange(-reach, down + reach + 1, dtype=torch.float64, device="cpu")
    starts = torch.arange(up, dtype=torch.float64, device="cpu")[:, None] / up * down
    times = starts - taps  # in input samples
    scaled = times * cutoff / rate
    window = torch.cos(math.pi * scaled.clamp(-WIDTH, WIDTH) / WIDTH / 2) ** 2
    bank = (torch.sinc(scaled) * window * cutoff / rate).to(samples.dtype)
    length = math.ceil(len(samples) * up / down)
    blocks = math.ceil(length / up)
    padded = torch.nn.functional.pad(samples, (reach, blocks * down + down + reach - len(samples)))
    phases = torch.nn.functional.conv1d(padded[None, None], bank[:, None], stride=down)  # [1, up, blocks]
    return phases[0].T.reshape(-1)[:length]
