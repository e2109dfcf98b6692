# SPDX-License-Identifier: Apache-2.0
"""Models of every family run their linear layers in int8: which ones, the bound on the outputs, and the way back.
``tests/parity/test_conformer.py`` does the same with the Conformers."""

import families
import pytest
import tiny_emformer_rnnt
import torch
from in_int8 import check
from steps import moved, numbers, seeded


def test_emformer_rnnt(monkeypatch):
    module = pytest.importorskip("torchaudio.models.rnnt")
    seeded(0)
    sizes = {"input_dim": 16, "encoding_dim": 24, "segment_length": 16, "time_reduction_stride": 4}
    options = {"transformer_ffn_dim": 32, "transformer_num_layers": 2}
    model = moved(tiny_emformer_rnnt.tiny(module, **sizes, **options), 0.1).eval()
    x, lengths = torch.randn(2, 40, 16, generator=numbers(1)), torch.tensor([40, 31])
    check(model, lambda model: model.transcribe(x, lengths)[0], monkeypatch)


@pytest.mark.parametrize("name", ["zipformer", "e-branchformer", "emformer", "mega"])
def test_family(name, monkeypatch):
    model, run = families.make(name)
    check(model, lambda model: run(model)[0], monkeypatch)
