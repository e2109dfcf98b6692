# SPDX-License-Identifier: Apache-2.0
"""The load test: its pacing by a clock of its own, and a tiny model in real time."""

import json

import pytest
import torch
from steps import numbers, one_thread, relative

from fastasr.asr.decoding.chunks import RIGHT_CONTEXT
from fastasr.benchmarks.models import streaming_peers
from fastasr.benchmarks.studies import streaming_load


class Clocked:
    """Serves a call in ``fixed + n each`` seconds of its own clock."""

    def __init__(self, fixed, each):
        self.now, self.fixed, self.each, self.calls = 0.0, fixed, each, []

    def step(self, features, streams):
        assert len(features) == len(streams) == len(set(streams))
        self.calls.append(streams)
        self.now += self.fixed + self.each * len(streams)

    def sleep(self, seconds):
        self.now += seconds

    def pace(self, count, **options):
        options = {"period": 0.25, "seconds": 4.0, "batch": 4} | options
        features = torch.zeros(count, 1, 1)
        return streaming_load.pace(
            self, count, features=features, clock=lambda: self.now, sleep=self.sleep, **options
        )


def test_every_chunk_of_every_stream_is_served_once():
    served = Clocked(0.01, 0.0)
    latencies = served.pace(4)
    assert latencies == pytest.approx([0.01] * len(latencies))
    assert len(latencies) in (4 * 16 - 3, 4 * 16)  # the later streams have their last chunk after the end
    assert sorted({stream for call in served.calls for stream in call}) == [0, 1, 2, 3]


def test_waiting_chunks_share_calls():
    served = Clocked(0.1, 0.001)
    latencies = served.pace(8)
    assert max(map(len, served.calls)) == 4
    assert 0.1 < min(latencies) <= max(latencies) < 0.25


def test_overload_ends_a_run():
    served = Clocked(0.0, 0.5)
    latencies = served.pace(4, seconds=1000.0)
    assert max(latencies) > streaming_load.OVERLOAD * 0.25
    assert len(latencies) < 50


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 9, 31, 32, 50])
def test_the_largest_number(limit):
    tried = []

    def sustained(n):
        tried.append(n)
        return n <= limit

    assert streaming_load.largest(sustained, 32) == min(limit, 32)
    assert len(tried) == len(set(tried)) <= 10


@pytest.mark.parametrize(("attempts", "expected"), [(1, 1), (2, 4)])
def test_a_pause_of_the_machine_is_tried_again(attempts, expected, monkeypatch):
    """The first attempt at two streams or more stalls each time; every later one is as fast as one stream."""
    seen = []

    def pace(served, count, *arguments):
        seen.append(count)
        return [1.0 if count > 1 and seen.count(count) == 1 else 0.1]

    monkeypatch.setattr(streaming_load, "pace", pace)

    class Served:
        def open(self, count): ...

        def step(self, features, streams): ...

    arguments = {"period": 0.32, "seconds": 1.0, "batch": 2, "most": 4, "attempts": attempts}
    found = streaming_load._limit(
        Served(), "name", features=torch.zeros(4, 1, 1), report=lambda _: None, **arguments
    )
    assert found["streams"] == expected
    assert found["p99_ms"] == 100.0
    assert found["tried_p99_ms"]["2"] == (1000.0 if attempts == 1 else 100.0)


def test_percentiles():
    latencies = [i / 100 for i in range(100, 0, -1)]
    assert streaming_load.percentile(latencies, 0.99) == 0.99
    assert streaming_load.percentile(latencies, 0.5) == 0.5
    assert streaming_load.percentile([0.3], 0.99) == 0.3


@pytest.fixture(scope="module")
def peers():
    pytest.importorskip("zipformer", exc_type=ImportError)
    pytest.importorskip("onnxruntime")
    with one_thread():
        yield streaming_peers.make(size="tiny", chunk=8, most=3)


def test_implementations_agree(peers):
    """The same chunks give the same outputs in any streams, alone and together (onnxruntime's outputs are
    projected).
    """
    outputs = {}
    for name, served in peers.items():
        served.open(3)
        generator = numbers(2)
        outputs[name] = []
        for streams in ([0], [2, 1], [0, 1, 2], [1]):
            x = torch.randn(len(streams), 2 * 8 + RIGHT_CONTEXT, 80, generator=generator)
            outputs[name].append(served.step(x, streams))
    expected = outputs.pop(streaming_peers.UPSTREAM)
    onnx, int8 = (outputs.pop(name) for name in (streaming_peers.ONNX, streaming_peers.ONNX_INT8))
    assert [len(y) for y in onnx] == [1, 2, 3, 1]
    for y, x in zip(int8, onnx, strict=True):
        assert 0 < (y - x).norm() < 0.1 * x.norm()
    for name, got in outputs.items():
        for y, x in zip(got, expected, strict=True):
            assert relative(y, x) < (1e-5 if name in (streaming_peers.SCRIPTED, "engine fp32") else 0.02), (
                name
            )


def test_unknown_implementation():
    with pytest.raises(ValueError, match=r"implementations are upstream, .* got tensorrt"):
        streaming_peers.make(["tensorrt"])


@pytest.mark.long
def test_a_tiny_model_in_real_time(tmp_path, capsys):
    pytest.importorskip("zipformer", exc_type=ImportError)
    pytest.importorskip("matplotlib")
    results, picture = tmp_path / "load.json", tmp_path / "load.png"
    page = tmp_path / "load.md"
    page.write_text("<!-- bench:start -->\n<!-- bench:end -->\n")
    arguments = ["--results", str(results), "--out", str(picture), "--page", str(page)]
    measured = ["--size", "tiny", "--chunk", "8", "--threads", "1", "--seconds", "0.8", "--most", "2"]
    assert streaming_load.main([*arguments, *measured, "--only", "engine fp32", "scripted"]) == 0
    found = json.loads(results.read_text())
    assert list(found["implementations"]) == ["engine fp32", "scripted"]
    for values in found["implementations"].values():
        assert 0 <= values["streams"] <= 2
        assert values["p50_ms"] <= values["p90_ms"] <= values["p99_ms"]
        assert values["latencies_ms"]
        assert values["tried_p99_ms"]
    assert found["implementations"]["engine fp32"]["packing_ms"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "engine fp32: " in capsys.readouterr().out
    assert f"| engine fp32 | {found['implementations']['engine fp32']['streams']} |" in page.read_text()
    assert streaming_load.main([*arguments, "--check"]) == 0
    page.write_text("<!-- bench:start -->\nold\n<!-- bench:end -->\n")
    assert streaming_load.main([*arguments, "--check"]) == 1
    assert streaming_load.main([*arguments, "--plot"]) == 0
    assert streaming_load.main(["--results", str(tmp_path / "none"), "--plot"]) == 2
