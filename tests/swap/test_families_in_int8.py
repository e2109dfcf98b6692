# SPDX-License-Identifier: Apache-2.0
"""Models of every family run their linear layers in int8: which ones, the bound on the outputs, and the way back.
``tests/parity/test_conformer.py`` does the same with the Conformers."""

import pytest
import tiny_emformer_rnnt
import tiny_zipformer
import torch
from in_int8 import check
from steps import moved, numbers, seeded


def zipformer():
    x, lengths = tiny_zipformer.batch()
    return tiny_zipformer.tiny(), lambda model: model(x, lengths)[0]


def e_branchformer():
    module = pytest.importorskip("espnet2.asr.encoder.e_branchformer_encoder")
    sizes = {"output_size": 24, "attention_heads": 3, "cgmlp_linear_units": 36, "cgmlp_conv_kernel": 7}
    options = {"num_blocks": 2, "linear_units": 28, "use_ffn": True, "macaron_ffn": True}
    x = torch.randn(3, 47, 20, generator=numbers(1))
    model = module.EBranchformerEncoder(20, **sizes, **options)
    return model, lambda model: model(x, torch.tensor([47, 40, 21]))[0]


def emformer():
    module = pytest.importorskip("torchaudio.models.emformer")
    x = torch.randn(3, 23, 12, generator=numbers(1))
    model = module.Emformer(12, 3, 20, 2, 4, left_context_length=5, right_context_length=2, max_memory_size=2)
    return model, lambda model: model(x, torch.tensor([21, 15, 9]))[0]


def emformer_rnnt():
    module = pytest.importorskip("torchaudio.models.rnnt")
    x = torch.randn(2, 40, 16, generator=numbers(1))
    sizes = {"input_dim": 16, "encoding_dim": 24, "segment_length": 16, "time_reduction_stride": 4}
    options = {"transformer_ffn_dim": 32, "transformer_num_layers": 2}
    model = tiny_emformer_rnnt.tiny(module, **sizes, **options)
    return model, lambda model: model.transcribe(x, torch.tensor([40, 31]))[0]


def mega():
    module = pytest.importorskip("espnet2.asr_transducer.decoder.mega_decoder")
    sizes = {"block_size": 16, "linear_size": 24, "qk_size": 8, "v_size": 20, "num_heads": 2}
    labels = torch.randint(1, 12, (3, 9), generator=numbers(1))
    return module.MEGADecoder(12, **sizes, num_blocks=2, max_positions=24), lambda model: model(labels)


@pytest.mark.parametrize("family", [zipformer, e_branchformer, emformer, emformer_rnnt, mega])
def test_family(family, monkeypatch):
    seeded(0)
    model, run = family()
    check(moved(model, 0.1).eval(), run, monkeypatch)
