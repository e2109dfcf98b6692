# SPDX-License-Identifier: Apache-2.0
"""A recording of half an hour causes no drift from the model's own stream and no growth of memory."""

import gc
import os

import pytest
import torch
from conftest import CHUNK, LEFT
from oracle import Alone
from steps import numbers, relative

from fastasr.asr import decoding
from fastasr.asr.streaming import EndpointRules, FbankStream, StreamingEncoder, StreamingRecogniser

pytest.importorskip("kaldi_native_fbank")
SECOND = 16000


def resident():
    """Returns the MiB of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def held():
    """Returns the MiB of all tensors, which other tests in this process do not disturb."""
    gc.collect()
    return sum(t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is torch.Tensor) / 2**20


def second(number):
    return torch.randn(SECOND, generator=numbers(number)) * 0.1


def listen(model, seconds, check_from, memory, growth):
    """Streams ``seconds`` of noise, compares the last chunks, and measures memory from a tenth of the way on."""
    recogniser = StreamingRecogniser(
        model, StreamingEncoder.from_model(model, CHUNK, LEFT), endpoint=EndpointRules(longest=5.0)
    )
    encoder = recogniser.encoder
    stream, alone = recogniser.open(), Alone(model, CHUNK, LEFT)
    computer, chunks = FbankStream(), decoding.FeatureChunks(CHUNK)
    before, compared, finals = None, 0, 0
    for number in range(seconds):
        samples = second(number)
        recogniser.push(stream, samples)
        expected = iter(chunks.accept(computer.accept(samples)))
        while encoder.ready:
            streams, y = encoder.advance()
            own = alone.step(next(expected))
            if number >= check_from:
                assert relative(y[0], own) < 5e-6
                compared += 1
            for result in recogniser.accept(streams, y):
                finals += result.final
        if number == seconds // 10:
            before = memory()
    assert compared > 10
    assert finals >= seconds // 6
    assert memory() - before < growth
    recogniser.close(stream)


def test_some_seconds(model):
    listen(model, 14, check_from=11, memory=held, growth=0.1)


@pytest.mark.long
def test_half_an_hour(model):
    listen(model, 1800, check_from=1790, memory=resident, growth=8)
