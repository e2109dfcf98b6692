# SPDX-License-Identifier: Apache-2.0
"""``fastasr transcribe`` on tiny models of each kind: upstream's text and times, files, errors."""

import itertools
import json
import sys

import beeps
import pytest
import torch
from tiny_parakeet import SIZES
from typer.testing import CliRunner

from fastasr.asr import decoding
from fastasr.asr.audio import recordings
from fastasr.asr.audio.captions import Timed, lines, srt, words
from fastasr.cli.app import app
from fastasr.models.transducer.label_looping import LabelLooping

transformers = pytest.importorskip("transformers")
PIECES = ["<pad>", " th", "e", " cat", "s", " sat", "."]
BLANK = len(PIECES)


def tokenizer():
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {piece.replace(" ", "▁"): i for i, piece in enumerate([*PIECES, "<blank>"])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["<pad>", "<blank>"])
    return transformers.ParakeetTokenizer(tokenizer_object=made, pad_token="<pad>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a function that returns a folder with a model of a kind and its processor."""

    def make(kind):
        place = tmp_path_factory.mktemp(kind)
        encoder = transformers.ParakeetEncoderConfig(**SIZES)
        torch.manual_seed(3)
        if kind == "ParakeetForCTC":
            config = transformers.ParakeetCTCConfig(
                vocab_size=len(PIECES), pad_token_id=0, encoder_config=encoder
            )
        else:
            sizes = {"decoder_hidden_size": 12, "num_decoder_layers": 1, "max_symbols_per_step": 2}
            config = getattr(transformers, kind.replace("For", "") + "Config")(
                vocab_size=BLANK + 1, pad_token_id=0, blank_token_id=BLANK, encoder_config=encoder, **sizes
            )
        model = getattr(transformers, kind)(config)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.3 * torch.randn_like(p)
        if kind != "ParakeetForCTC":
            model.generation_config.decoder_start_token_id = BLANK
            model.generation_config.suppress_tokens = (
                list(range(BLANK + 1, BLANK + 6)) if "TDT" in kind else None
            )
        features = transformers.ParakeetFeatureExtractor(feature_size=SIZES["num_mel_bins"])
        if kind == "ParakeetForCTC":  # labels that change with the frame
            speech = recordings.generated(2.0, 16000, 1).samples.numpy()
            with torch.no_grad():
                logits = model.eval()(**features(speech, sampling_rate=16000, return_tensors="pt")).logits
                model.ctc_head.bias -= logits.mean((0, 1))
        model.save_pretrained(place)
        kinds = {"ParakeetForCTC": "ctc", "ParakeetForRNNT": "rnnt", "ParakeetForTDT": "tdt"}
        transformers.ParakeetProcessor(features, tokenizer(), decoder_type=kinds[kind]).save_pretrained(place)
        return place

    return make


@pytest.fixture
def recording(tmp_path):
    def make(seconds=2.0, rate=16000, name="speech.wav"):
        beeps.write_wav(tmp_path / name, recordings.generated(seconds, rate, 1).samples, rate)
        return tmp_path / name

    return make


def call(*arguments):
    return CliRunner().invoke(app, ["transcribe", *map(str, arguments)])


@pytest.mark.parametrize("kind", ["ParakeetForCTC", "ParakeetForRNNT", "ParakeetForTDT"])
def test_text_and_times_are_upstreams(kind, folder, recording, tmp_path):
    place, path = folder(kind), recording()
    results = []
    for option in ("--swap", "--no-swap"):
        done = call(place, path, "--json", "--out", tmp_path / option, option)
        assert done.exit_code == 0, done.output
        results.append(json.loads(done.stdout)[0])
    ours, theirs = results
    assert ours["text"] == theirs["text"]
    assert ours["words"] == theirs["words"]
    assert len(ours["words"]) > 1
    assert ours["seconds"] == 2.0
    assert all(0 <= w["start"] < w["end"] <= 2.1 for w in ours["words"] if kind == "ParakeetForCTC")
    spoken = "".join(word["text"] for word in ours["words"])
    assert spoken.replace(" ", "") == ours["text"].replace(" ", "")
    written = tmp_path / "--swap"
    assert (written / "speech.txt").read_text() == ours["text"] + "\n"
    assert json.loads((written / "speech.json").read_text()) == ours
    assert (written / "speech.srt").read_text().startswith("1\n00:00:0")


@pytest.mark.parametrize("kind", ["ParakeetForRNNT", "ParakeetForTDT"])
def test_greedy_search_is_one_native_call(kind, folder, recording, monkeypatch):
    searched, search = [], LabelLooping.search

    def counted(self, *arguments):
        searched.append(self.why_not)
        return search(self, *arguments)

    monkeypatch.setattr(LabelLooping, "search", counted)
    place, path = folder(kind), recording()
    assert call(place, path).exit_code == 0
    assert searched == [""]
    assert call(place, path, "--no-swap").exit_code == 0
    assert len(searched) == 1


def test_ctc_is_collapsed(folder, recording):
    """The text is that of transformers' own decoding of the argmax."""
    place, path = folder("ParakeetForCTC"), recording(3.0)
    model = transformers.ParakeetForCTC.from_pretrained(place).eval()
    processor = transformers.AutoProcessor.from_pretrained(place)
    inputs = processor(recordings.read(path).samples.numpy(), sampling_rate=16000)
    expected = processor.batch_decode(model.generate(**inputs))[0]
    done = call(place, path)
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == expected.strip()
    assert "real-time factor" in done.stderr
    assert "modules replaced" in done.stderr


@pytest.mark.parametrize("kind", ["ParakeetForCTC", "ParakeetForRNNT", "ParakeetForTDT"])
def test_beam_search(kind, folder, recording):
    """The text is that of the search's tokens, whichever code runs the encoder. Each word has its time."""
    place, path = folder(kind), recording()
    found = [call(place, path, "--json", "--beam", "5", option) for option in ("--swap", "--no-swap")]
    assert [done.exit_code for done in found] == [0, 0], found[0].output
    (ours,), (theirs,) = (json.loads(done.stdout) for done in found)
    assert ours["text"] == theirs["text"]
    assert ours["words"] == theirs["words"]
    model = getattr(transformers, kind).from_pretrained(place).eval()
    processor = transformers.AutoProcessor.from_pretrained(place)
    inputs = processor(recordings.read(path).samples.numpy(), sampling_rate=16000)
    with torch.no_grad():
        if kind == "ParakeetForCTC":
            result = decoding.ctc_prefix_beam_search(model(**inputs).logits.log_softmax(-1)[:, :-1], beam=5)
        else:
            encoded = model.encoder(**inputs, output_attention_mask=True)
            frames = encoded.attention_mask.sum(1)
            result = decoding.modified_beam_search(model, encoded.last_hidden_state, frames, beam=5)
    (tokens,) = result.tokens
    assert ours["text"].strip() == "".join((*PIECES, "")[token] for token in tokens).strip()
    assert len(ours["words"]) > 1
    assert all(word["start"] < word["end"] for word in ours["words"])
    assert all(a["end"] < b["end"] for a, b in itertools.pairwise(ours["words"]))


@pytest.mark.parametrize("kind", ["ParakeetForCTC", "ParakeetForTDT"])
def test_beam_search_in_bfloat16(kind, folder, recording, monkeypatch):
    """The parts that the search runs are converted once, and for all recordings."""
    converted = []
    of_module = torch.nn.Module.float
    monkeypatch.setattr(
        torch.nn.Module, "float", lambda module: converted.append(module) or of_module(module)
    )
    done = call(folder(kind), recording(), recording(), "--dtype", "bfloat16", "--beam", "4")
    assert done.exit_code == 0, done.output
    first, second = done.stdout.strip().splitlines()
    assert first == second
    assert len(converted) == (0 if kind == "ParakeetForCTC" else 3)


def test_beam_search_that_a_model_cannot_have(folder, recording):
    place = folder("ParakeetForRNNT")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"hidden_act": "silu"}))
    assert call(place, recording()).exit_code == 0
    done = call(place, recording(), "--beam", "4")
    assert done.exit_code == 2
    assert "--beam: ModifiedBeamSearch: this ParakeetForRNNT cannot be searched: " in done.stderr
    assert "expected ReLU or Tanh" in done.stderr


@pytest.mark.parametrize("search", [(), ("--beam", "3")], ids=["greedy", "beam"])
@pytest.mark.parametrize("kind", ["ParakeetForCTC", "ParakeetForTDT"])
def test_byte_level_tokens(kind, search, folder, recording):
    """Tokens of byte-level BPE become text, in the words with their times too."""
    from tokenizers import Tokenizer, decoders, models

    place, path = folder(kind), recording()
    made = Tokenizer.from_file(str(place / "tokenizer.json"))
    written = ["<pad>", "Ġth", "Ã©", "Ġä½ł", "å¥½", "Ġs", ".", "<blank>"]
    assert made.get_vocab_size() == len(written)
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(written)}, []))
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<pad>", "<blank>"])
    transformers.ParakeetTokenizer(tokenizer_object=made, pad_token="<pad>").save_pretrained(place)
    done = call(place, path, "--json", *search)
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)
    for text in (found["text"], "".join(word["text"] for word in found["words"])):
        assert text
        assert set(text) <= set("th é你好s.")


def test_another_rate(folder, recording):
    pytest.importorskip("soxr")
    done = call(folder("ParakeetForCTC"), recording(rate=8000), recording(name="other.wav"), "--json")
    assert done.exit_code == 0, done.output
    assert [row["seconds"] for row in json.loads(done.stdout)] == [2.0, 2.0]


def test_refusals(folder, recording, tmp_path, monkeypatch):
    place, path = folder("ParakeetForCTC"), recording()
    cases = [
        ((tmp_path, path), "config.json cannot be read"),
        ((place, path, "--out", "/dev/null/out"), "--out: /dev/null/out cannot be written to"),
        ((place, tmp_path / "none.wav"), "none.wav"),
        ((place, path, "--dtype", "int8"), "--dtype: expected one of float32, bfloat16, float16, got int8"),
        ((place, path, "--device", "abacus"), "abacus"),
        ((place, path, "--beam", "0"), "--beam: expected at least 1, got 0"),
    ]
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"architectures": ["WhisperModel"]}')
    cases.append(
        ((other, path), "expected a ParakeetForCTC, ParakeetForRNNT or ParakeetForTDT, got WhisperModel")
    )
    whole = path.read_bytes()
    for name, content, reason in (
        ("nothing", b"", "nothing.wav: it ends too early"),
        ("half a header", whole[:20], "half a header.wav: "),
        ("no frames", whole[:44], "no frames.wav: the recording is empty (0 samples at 16000 Hz)"),
        ("no channels", whole[:22] + b"\0\0" + whole[24:], "no channels.wav: "),
        ("one sample", whole[:46], "one sample.wav is too short: expected at least 320 samples at 16000 Hz"),
        ("one frame", whole[: 44 + 2 * 319], "at least 320 samples at 16000 Hz (0.02 s), got 319"),
    ):
        (other / f"{name}.wav").write_bytes(content)
        cases.append(((place, other / f"{name}.wav"), reason))
    for arguments, reason in cases:
        done = call(*arguments)
        assert done.exit_code == 2, done.output
        said = " ".join(done.stderr.split())
        assert reason in said
        assert "Traceback" not in said
        assert not said.endswith(":")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'fastasr[asr,cli]' 'transformers>=5.23'" in call(place, path).stderr


def test_recordings_that_would_write_the_same_files_are_refused(folder, recording, tmp_path):
    place = folder("ParakeetForCTC")
    for name in ("monday", "tuesday"):
        (tmp_path / name).mkdir()
    paths = [recording(name=f"{name}/call.wav") for name in ("monday", "tuesday")]
    done = call(place, *paths, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert f"--out: {paths[0]} and {paths[1]} would both be written as call.txt" in done.stderr
    assert not (tmp_path / "out").exists()
    assert call(place, *paths).exit_code == 0
    assert call(place, paths[0], paths[0], "--out", tmp_path / "out").exit_code == 0


def test_json_has_the_recordings_before_one_that_cannot_be_read(folder, recording, tmp_path):
    place, path = folder("ParakeetForCTC"), recording()
    done = call(place, path, tmp_path / "none.wav", "--json")
    assert done.exit_code == 2
    assert [row["recording"] for row in json.loads(done.stdout)] == [str(path)]
    done = call(place, tmp_path / "none.wav", "--json")
    assert (done.exit_code, done.stdout) == (2, "")


@pytest.mark.parametrize("samples", [320, 321, 479, 640])
@pytest.mark.parametrize("kind", ["ParakeetForCTC", "ParakeetForTDT"])
def test_short_recordings_have_finite_features(kind, samples, folder, recording, tmp_path):
    """The shortest recordings are read: their features are those of upstream's extractor."""
    place, path = folder(kind), tmp_path / "short.wav"
    path.write_bytes(recording().read_bytes()[: 44 + 2 * samples])
    processor = transformers.AutoProcessor.from_pretrained(place)
    inputs = processor(recordings.read(path).samples.numpy(), sampling_rate=16000)
    assert inputs["input_features"].isfinite().all()
    for search in ((), ("--beam", "3")):
        done = call(place, path, *search)
        assert done.exit_code == 0, done.output


SAID = [
    *(Timed(" the", 0.0, 0.2), Timed(" ca", 0.3, 0.4), Timed("t", 0.4, 0.5), Timed(".", 0.5, 0.5)),
    *(Timed(" It", 2.0, 2.1), Timed(" sat", 2.1, 61.0), Timed("!", 61.0, 61.25)),
]


def test_captions():
    found = words(SAID)
    assert [word.text for word in found] == ["the", "cat.", "It", "sat!"]
    assert found[1] == Timed("cat.", 0.3, 0.5)
    assert srt(lines(found)) == (
        "1\n00:00:00,000 --> 00:00:00,500\nthe cat.\n\n"
        "2\n00:00:02,000 --> 00:00:02,100\nIt\n\n"
        "3\n00:00:02,100 --> 00:01:01,250\nsat!\n"
    )
    long = [Timed(" word", 0.1 * i, 0.1 * i + 0.05) for i in range(40)]
    assert all(len(line.text) <= 80 for line in lines(words(long)))
    assert " ".join(line.text for line in lines(words(long))) == " ".join(["word"] * 40)
