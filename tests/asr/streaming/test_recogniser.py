# SPDX-License-Identifier: Apache-2.0
"""Words of many streams at once are those of each stream alone; segments end where the rules say."""

import pytest
import torch
from conftest import CHUNK, LEFT
from oracle import Alone
from steps import numbers

from fastasr.asr import decoding
from fastasr.asr.streaming import EndpointRules, FbankStream, Result, StreamingEncoder, StreamingRecogniser
from fastasr.asr.streaming.recogniser import FRAME

pytest.importorskip("kaldi_native_fbank")


@pytest.fixture(scope="module")
def recordings():
    generator = numbers(7)
    return [torch.randn(n, generator=generator) * 0.1 for n in (9000, 14000, 6001)]


def engine(model, **options):
    return StreamingEncoder.from_model(model, CHUNK, LEFT, **options)


def alone(model, recogniser, samples, method):
    """Runs the search over the stream's own chunks, encoded one by one by the model's own code."""
    computer, chunks, stream = FbankStream(), decoding.FeatureChunks(CHUNK), Alone(model, CHUNK, LEFT)
    features = torch.cat([computer.accept(samples), computer.finish()])
    search, state = recogniser.search, recogniser.search.start()
    with torch.no_grad():
        for chunk in [*chunks.accept(features), *chunks.finish()]:
            y = stream.step(chunk)[None]
            state = search.advance(state, model.ctc_output(y) if method.startswith("ctc-") else y)
    return search.result(state)


@pytest.mark.parametrize("method", decoding.METHODS)
def test_streams_together_are_as_alone(model, recordings, method):
    with StreamingRecogniser(
        model, engine(model), method, beam=3, to_text=lambda tokens: " ".join(map(str, tokens))
    ) as recogniser:
        streams = [recogniser.open() for _ in recordings]
        waiting = [list(samples.split(1600 + 500 * i)) for i, samples in enumerate(recordings)]
        last = {}
        while any(waiting):
            for stream, pieces in zip(streams, waiting, strict=True):
                if pieces:
                    recogniser.push(stream, pieces.pop(0))
                    if not pieces:
                        recogniser.end(stream)
            for result in recogniser.advance():
                before = last.get(result.stream)
                assert before is None or result.end > before.end
                last[result.stream] = result
        for stream in streams:
            for result in recogniser.finish(stream):
                last[stream] = result
        spoken = 0
        for stream, samples in zip(streams, recordings, strict=True):
            expected, found = alone(model, recogniser, samples, method), last[stream]
            assert found.final
            assert recogniser.finals(stream) == [found]
            assert found.tokens == expected.tokens[0]
            assert found.times == pytest.approx([FRAME * frame for frame in expected.timestamps[0]])
            assert found.score == pytest.approx(expected.scores[0], rel=1e-3)
            assert found.text == " ".join(map(str, found.tokens))
            spoken += len(found.tokens)
        assert spoken >= 3
        assert recogniser.seconds["encoder"] > 0
    assert recogniser.streams == []


def test_endpoint_rules():
    rules = EndpointRules(silence=2.0, trailing=0.8, longest=4.0)
    assert not rules.reached(49, None)
    assert rules.reached(50, None)
    assert not rules.reached(40, 20)
    assert rules.reached(41, 20)
    assert rules.reached(100, 99)
    assert not EndpointRules(None, None, None).reached(10**6, None)
    assert not EndpointRules(None, 1.0, None).reached(10**6, None)


class _Spoken:
    """A CTC search over frames whose first channel is the token."""

    def __init__(self, recogniser):
        self.recogniser = recogniser
        recogniser.head = lambda y: torch.nn.functional.one_hot(y[..., 0].long(), 12).float().log()

    def say(self, stream, tokens):
        y = torch.tensor(tokens, dtype=torch.float32).view(1, -1, 1)
        (result,) = self.recogniser.accept([stream], y)
        return result


def test_segments_end_after_silence(model):
    rules = EndpointRules(silence=0.4, trailing=0.2, longest=1.2)
    recogniser = StreamingRecogniser(model, engine(model), "ctc-greedy", endpoint=rules)
    stream = recogniser.open()
    say = _Spoken(recogniser).say
    assert say(stream, [0, 3, 0, 0]) == Result(
        stream, 0, [3], [pytest.approx(FRAME)], 0.0, 4 * FRAME, pytest.approx(0.0), None, False
    )
    partial = say(stream, [4, 0, 0, 0])
    assert (partial.tokens, partial.final) == ([3, 4], False)
    final = say(stream, [0, 0, 0, 0])  # 7 frames after the token: 0.28 s
    assert (final.tokens, final.final, final.segment) == ([3, 4], True, 0)
    quiet = say(stream, [0] * 4)
    assert (quiet.tokens, quiet.segment, quiet.start) == ([], 1, pytest.approx(12 * FRAME))
    assert not say(stream, [0] * 4).final
    assert say(stream, [0] * 4).final  # 0.48 s of nothing
    results = [say(stream, [5, 6, 5, 6]) for _ in range(8)]
    assert [result.final for result in results] == [False] * 7 + [True]  # 32 frames are 1.28 s
    assert results[7].segment == 2
    assert results[7].times[0] == pytest.approx(24 * FRAME)
    assert [r.segment for r in recogniser.finals(stream)] == [0, 1, 2]
    assert recogniser.result(stream).segment == 3
    recogniser.reset(stream)
    assert recogniser.result(stream).segment == 0


def test_an_error_of_to_text_loses_no_frames(model):
    recogniser = StreamingRecogniser(model, engine(model), "ctc-greedy", to_text=lambda tokens: 1 // 0)
    streams = [recogniser.open(), recogniser.open()]
    _Spoken(recogniser)
    spoken = torch.tensor([[0.0, 3, 0, 4], [5, 0, 6, 0]]).unsqueeze(2)
    with pytest.raises(ZeroDivisionError):
        recogniser.accept(streams, spoken)
    recogniser.to_text = str
    assert [recogniser.result(stream).text for stream in streams] == ["[3, 4]", "[5, 6]"]
    assert [recogniser.result(stream).end for stream in streams] == [4 * FRAME, 4 * FRAME]


def test_the_last_result_is_final_if_no_chunk_waits(model):
    recogniser = StreamingRecogniser(model, engine(model), "ctc-greedy")
    silent, spoken = recogniser.open(), recogniser.open()
    recogniser.push(silent, torch.zeros(0))
    _Spoken(recogniser).say(spoken, [0, 3, 0, 0])
    for stream, tokens in ((silent, []), (spoken, [3])):
        (final,) = recogniser.finish(stream)
        assert (final.tokens, final.final) == (tokens, True)
        assert recogniser.finals(stream) == [final]
        assert recogniser.finish(stream) == []


def test_what_is_refused(model):
    encoder = engine(model)
    for options, match in (
        ({"method": "best"}, "method must be one of greedy"),
        ({"beam": 0, "method": "beam"}, "beam"),
    ):
        with pytest.raises(ValueError, match=match):
            StreamingRecogniser(model, encoder, **options)
    with pytest.raises(TypeError, match="must be a StreamingEncoder, got AsrModel"):
        StreamingRecogniser(model, model)
    with pytest.raises(ValueError, match="has no CTC output"):
        StreamingRecogniser(model.encoder, encoder, "ctc-greedy")
    recogniser = StreamingRecogniser(model, encoder)
    for call in (recogniser.close, recogniser.reset, recogniser.end, recogniser.result, recogniser.finish):
        with pytest.raises(ValueError, match="no open stream 7"):
            call(7)
    model.train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            StreamingRecogniser(model, encoder)
    finally:
        model.eval()
