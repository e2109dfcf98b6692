# SPDX-License-Identifier: Apache-2.0
"""Damaged recordings, models and reports end with a clear ValueError or are read: no crash, no hang, no memory beyond
what the file holds.
"""

import contextlib
import json
import math
import random
import re
import shutil
import struct
import zipfile

import beeps
import children
import pytest
import torch

from fastasr.asr.audio import recordings
from fastasr.asr.recipe import checkpoints, curves, recogniser, sizes
from fastasr.asr.recipe.logs import COLUMNS, Log
from fastasr.asr.recipe.training import learn_units
from fastasr.benchmarks import rows

COUNTS = [pytest.param(20, id="20"), pytest.param(1000, id="1000", marks=pytest.mark.long)]


def check(function, path, count, change=children.mutated, memory=children.MEMORY, keep=()):
    """Calls ``function(path)`` in children for ``count`` mutations of the file, and for the file itself."""
    draw, content = random.Random(torch.initial_seed()), path.read_bytes()
    given = content.decode() if change is children.mutated_text else content
    made = [content, b"", *keep, *(change(given, draw) for _ in range(count - 2))]
    outcomes = children.each(_with, [(function, path, each) for each in made], memory)
    for number, (each, (kind, *what)) in enumerate(zip(made, outcomes, strict=True)):
        if kind == "raised":
            fine = what[0] == "ValueError" and what[1].strip() and not re.search("alloc|memory", what[1])
        else:
            fine = kind == "returned"
        if not fine or (number == 0 and kind != "returned"):
            (path.parent / "damaged").write_bytes(each)
            pytest.fail(f"{path.parent / 'damaged'}, number {number}: {kind}, {': '.join(map(str, what))}")


def _with(function, path, content):
    path.write_bytes(content)
    function(path)


# --------------------------------------------------------------------------- recordings
def _read_recording(path):
    size = path.stat().st_size
    clip = recordings.read(path)
    assert clip.samples.dim() == 1
    assert bool(clip.samples.isfinite().all())
    assert math.isfinite(clip.seconds)
    if path.suffix == ".wav":
        assert len(clip.samples) <= size
    with contextlib.suppress(recordings.NoAudio):
        recordings.from_folder(path.parent, lambda line: None)


SPEECH = recordings.generated(0.4, 8000, 1).samples
HUGE = [n.to_bytes(4, "little") for n in (0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["PCM_16.wav", "PCM_24.wav", "FLOAT.wav", "PCM_16.flac", "VORBIS.ogg"])
def test_recordings(tmp_path, kind, count):
    subtype, _, suffix = kind.partition(".")
    path, keep = tmp_path / f"speech.{suffix}", ()
    if kind == "PCM_16.wav":
        beeps.write_wav(path, SPEECH, channels=2)
        whole = path.read_bytes()
        keep = [whole[:40] + size + whole[44:] for size in HUGE]  # the length of the samples
        keep += [whole[:4] + size + whole[8:40] + size + whole[44:] for size in HUGE]
        keep += [whole[:24] + struct.pack("<I", rate) + whole[28:] for rate in (0, 1, 1 << 31)]
        keep += [whole[:22] + struct.pack("<H", channels) + whole[24:] for channels in (0, 3, 1 << 15)]
    else:
        soundfile = pytest.importorskip("soundfile")
        soundfile.write(path, SPEECH.numpy(), 8000, subtype=subtype)
        whole = path.read_bytes()
        if suffix == "flac":  # the number of samples: 36 bits of the first block
            keep = [whole[:21] + bytes([whole[21] | 0x0F]) + b"\xff" * 4 + whole[26:]]
        if subtype == "FLOAT":
            keep = [whole[:-8] + struct.pack("<ff", math.nan, math.inf)]
    check(_read_recording, path, count, keep=keep)


# --------------------------------------------------------------------------- models of the recipe
def _load(path):
    found = recogniser.load(path)
    encoder, _ = found.search("greedy")
    assert encoder.chunk_size > 0


def _checkpoint(path):
    units = learn_units("char", [])
    arguments = sizes.config("tiny", len(units), 40)
    state = sizes.build(arguments).state_dict()
    content = {
        "model": {},
        "model_avg": state,
        "arguments": arguments,
        "units": units.state_dict(),
        "step": 1,
    }
    checkpoints.save(path, content | {"features": {"rate": 8000, "bins": 40}})


@pytest.mark.parametrize("count", COUNTS)
def test_checkpoints(tmp_path, count):
    _checkpoint(tmp_path / "last.pt")
    check(_load, tmp_path / "last.pt", count)


@pytest.mark.parametrize(
    ("pickled", "error"),
    [
        (b"\x80\x02.", "IndexError"),  # returns from an empty stack
        (b"\x80\x02}J.", "error"),  # a number of four bytes, of which one is there
        (b"\x80\x02}}K\x01s.", "TypeError"),  # a dict as a key
    ],
)
def test_checkpoints_with_a_damaged_pickle(tmp_path, pickled, error):
    """torch's unpickler ends with errors of many types."""
    with zipfile.ZipFile(tmp_path / "last.pt", "w") as file:
        file.writestr("last/data.pkl", pickled)
        file.writestr("last/version", "3\n")
    with pytest.raises(ValueError, match=f"last.pt is damaged: {error}: "):
        checkpoints.load(tmp_path / "last.pt")


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"arguments": 3}, "AttributeError"),
        ({"arguments": sizes.config("tiny", 3, 40) | {"encoder_dims": "8"}}, "TypeError"),
        ({"units": {}}, "KeyError"),
        ({"units": []}, "TypeError"),
        ({"features": {}}, "KeyError"),
        ({"model_avg": []}, "TypeError"),
    ],
)
def test_checkpoints_with_wrong_entries(tmp_path, wrong, error):
    path = tmp_path / "last.pt"
    _checkpoint(path)
    checkpoints.save(path, checkpoints.load(path) | wrong)
    with pytest.raises(ValueError, match=f"last.pt is damaged: {error}: "):
        recogniser.load(path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("exported")
    _checkpoint(folder / "last.pt")
    recogniser.export(folder / "last.pt", folder / "onnx")
    return folder / "onnx"


def _load_folder(path):
    _load(path.parent)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    "name", ["encoder.onnx", "decoder.onnx", "joiner.onnx", "recogniser.json", "tokens.txt"]
)
def test_onnx_files(exported, tmp_path, name, count):
    shutil.copytree(exported, tmp_path / "onnx")
    text = not name.endswith("onnx")
    check(_load_folder, tmp_path / "onnx" / name, count, children.mutated_text if text else children.mutated)


# --------------------------------------------------------------------------- folders of transformers
def _load_transformers(path):
    from fastasr.cli import transcribe

    def refuse(message):
        raise ValueError(message)

    transcribe.fail = refuse
    transcribe.load(path.parent, "cpu", torch.float32)


@pytest.fixture(scope="module")
def parakeet(tmp_path_factory):
    transformers = pytest.importorskip("transformers", minversion="5.23")
    from tiny_parakeet import SIZES
    from tokenizers import Tokenizer, models

    folder = tmp_path_factory.mktemp("parakeet")
    encoder = transformers.ParakeetEncoderConfig(**SIZES)
    config = transformers.ParakeetCTCConfig(vocab_size=7, pad_token_id=0, encoder_config=encoder)
    transformers.ParakeetForCTC(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate("<abcdef")}, []))
    tokenizer = transformers.ParakeetTokenizer(tokenizer_object=tokenizer, pad_token="<")
    features = transformers.ParakeetFeatureExtractor(feature_size=SIZES["num_mel_bins"])
    transformers.ParakeetProcessor(features, tokenizer, decoder_type="ctc").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_models_of_transformers(parakeet, tmp_path, name, count):
    shutil.copytree(parakeet, tmp_path / "model")
    path, keep = tmp_path / "model" / name, []
    if name == "config.json":
        config = json.loads(path.read_text())
        for wrong in (
            [],
            {"architectures": None},
            {"architectures": []},
            {"architectures": [["ParakeetForCTC"]]},
        ):
            keep.append(json.dumps(wrong).encode())
        for size in ("hidden_size", "intermediate_size", "num_hidden_layers"):
            for value in (100_000, 10**7):
                keep.append(
                    json.dumps(config | {"encoder_config": config["encoder_config"] | {size: value}}).encode()
                )
    check(
        _load_transformers,
        path,
        count,
        children.mutated_text if name == "config.json" else children.mutated,
        memory=4 * children.MEMORY,
        keep=keep,
    )


# --------------------------------------------------------------------------- logs and rows
def _read_log(path):
    curves.read(path)
    Log(path, 5).close()


def _read_rows(path):
    rows.read(path)


@pytest.mark.parametrize("count", COUNTS)
def test_logs_and_rows(tmp_path, count):
    log = Log(tmp_path / "log.csv")
    for step in range(1, 9):
        log.write(**dict.fromkeys(COLUMNS, step / 3) | {"step": step, "epoch": 0})
    log.close()
    check(_read_log, tmp_path / "log.csv", count, children.mutated_text)
    fields = dict.fromkeys(("suite", "name", "case", "shape", "dtype", "device", "implementation"), "x")
    fields |= {"median_ms": 1.5, "q1_ms": 1.25, "q3_ms": 2.0, "reps": 7}
    rows.write(tmp_path / "rows.jsonl", [rows.Row(**fields, pass_="forward")] * 3)
    check(_read_rows, tmp_path / "rows.jsonl", count, children.mutated_text)
