# SPDX-License-Identifier: Apache-2.0
"""80-bin log-mel filterbanks at 16 kHz, as Zipformer recipes compute them (kaldi-native-fbank)."""

import math

import torch

from fastasr.benchmarks.upstream import BINS
from fastasr.demo.audio import Clip

RATE = 16000
WIDTH = 24  # zero crossings of the resampling filter on each side
ROLLOFF = 0.95  # of the lower Nyquist frequency


def resample(samples: torch.Tensor, rate: int, wanted: int = RATE) -> torch.Tensor:
    """Band-limited interpolation from ``rate`` to ``wanted`` Hz: a Hann-windowed sinc in ``wanted / gcd``
    phases.

    Output sample ``m`` is the sum over ``n`` of x[n] h(m / wanted - n / rate), h(t) = c sinc(c t) hann(t) /
    rate with the cut-off c at ``ROLLOFF`` of the lower rate. Length: ceil(len * wanted / rate). What was
    recorded at 8 kHz has nothing above 4 kHz after it either; the upper mel bins then hold the floor of the
    logarithm.
    """
    if rate == wanted:
        return samples
    divisor = math.gcd(rate, wanted)
    down, up = rate // divisor, wanted // divisor
    cutoff = ROLLOFF * min(rate, wanted)
    reach = math.ceil(WIDTH * rate / cutoff)  # input samples on each side
    taps = torch.arange(-reach, down + reach + 1, dtype=torch.float64)
    times = torch.arange(up, dtype=torch.float64)[:, None] / up * down - taps  # in input samples
    scaled = times * cutoff / rate
    window = torch.cos(math.pi * scaled.clamp(-WIDTH, WIDTH) / WIDTH / 2) ** 2
    bank = (torch.sinc(scaled) * window * cutoff / rate).to(samples.dtype)
    length = math.ceil(len(samples) * up / down)
    blocks = math.ceil(length / up)
    padded = torch.nn.functional.pad(samples, (reach, blocks * down + down + reach - len(samples)))
    phases = torch.nn.functional.conv1d(padded[None, None], bank[:, None], stride=down)  # [1, up, blocks]
    return phases[0].T.reshape(-1)[:length]


def fbank(clip: Clip) -> torch.Tensor:
    """``[frames, 80]``: 25 ms windows every 10 ms, no dither, up to 400 Hz below Nyquist."""
    import kaldi_native_fbank

    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = RATE
    options.frame_opts.dither = 0.0
    options.frame_opts.snip_edges = False
    options.mel_opts.num_bins = BINS
    options.mel_opts.high_freq = -400.0
    computer = kaldi_native_fbank.OnlineFbank(options)
    computer.accept_waveform(RATE, resample(clip.samples, clip.rate).tolist())
    computer.input_finished()
    frames = [torch.from_numpy(computer.get_frame(i).copy()) for i in range(computer.num_frames_ready)]
    return torch.stack(frames)


def batch(clips: list[Clip]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features ``[B, T, 80]``, padded with the floor of the logarithm as recipes do, and their lengths."""
    features = [fbank(clip) for clip in clips]
    padded = torch.nn.utils.rnn.pad_sequence(features, batch_first=True, padding_value=math.log(1e-10))
    return padded, torch.tensor([len(f) for f in features])
