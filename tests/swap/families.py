# SPDX-License-Identifier: Apache-2.0
"""A small upstream model of every family, and how to run it."""

import nemo_encoder
import pytest
import tiny_emformer_rnnt
import tiny_zipformer
import torch
from steps import numbers
from tiny_parakeet import SIZES, STILL


def zipformer():
    x, lengths = tiny_zipformer.batch()
    return tiny_zipformer.tiny(), lambda model: model(x, lengths)[0]


def e_branchformer():
    module = pytest.importorskip("espnet2.asr.encoder.e_branchformer_encoder")
    sizes = {"output_size": 24, "attention_heads": 3, "cgmlp_linear_units": 36, "cgmlp_conv_kernel": 7}
    options = {"num_blocks": 2, "linear_units": 28, "use_ffn": True, "macaron_ffn": True}
    x = torch.randn(3, 47, 20, generator=numbers(1))
    lengths = torch.tensor([47, 40, 21])
    return module.EBranchformerEncoder(20, **sizes, **options), lambda model: model(x, lengths)[0]


def emformer():
    module = pytest.importorskip("torchaudio.models.emformer")
    x, lengths = torch.randn(3, 23, 12, generator=numbers(1)), torch.tensor([21, 15, 9])
    model = module.Emformer(12, 3, 20, 2, 4, left_context_length=5, right_context_length=2, max_memory_size=2)
    return model, lambda model: model(x, lengths)[0]


def emformer_rnnt():
    module = pytest.importorskip("torchaudio.models.rnnt")
    x, lengths = torch.randn(2, 40, 16, generator=numbers(1)), torch.tensor([40, 31])
    sizes = {"input_dim": 16, "encoding_dim": 24, "segment_length": 16, "time_reduction_stride": 4}
    options = {"transformer_ffn_dim": 32, "transformer_num_layers": 2}
    model = tiny_emformer_rnnt.tiny(module, **sizes, **options)
    return model, lambda model: model.transcribe(x, lengths)[0]


def mega():
    module = pytest.importorskip("espnet2.asr_transducer.decoder.mega_decoder")
    sizes = {"block_size": 16, "linear_size": 24, "qk_size": 8, "v_size": 20, "num_heads": 2}
    labels = torch.randint(1, 12, (3, 9), generator=numbers(1))
    return module.MEGADecoder(12, **sizes, num_blocks=2, max_positions=24), lambda model: model(labels)


def emformer_stream():
    module = pytest.importorskip("torchaudio.models.emformer")
    chunks, lengths = torch.randn(4, 3, 6, 12, generator=numbers(1)), torch.tensor([6, 6, 4])
    model = module.Emformer(12, 3, 20, 2, 4, left_context_length=5, right_context_length=2, max_memory_size=2)

    def run(model):
        found, states = [], None
        for chunk in chunks:
            y, _, states = model.infer(chunk, lengths, states)
            found.append(y)
        return found

    return model, run


def rotary_mega():
    module = pytest.importorskip("espnet2.asr_transducer.decoder.mega_decoder")
    sizes = {"block_size": 16, "linear_size": 24, "qk_size": 8, "v_size": 20, "num_heads": 2}
    labels = torch.randint(1, 12, (3, 9), generator=numbers(1))
    made = module.MEGADecoder(12, **sizes, num_blocks=2, max_positions=24, rel_pos_bias_type="rotary")
    return made, lambda model: model(labels)


def _features():
    x = torch.randn(3, 203, SIZES["num_mel_bins"], generator=numbers(1))
    mask = (torch.arange(203) < torch.tensor([203, 150, 9])[:, None]).long()
    return {"input_features": x, "attention_mask": mask}


def parakeet():
    transformers = pytest.importorskip("transformers")
    config = transformers.ParakeetEncoderConfig(**SIZES, **STILL)
    inputs = _features()
    return transformers.ParakeetEncoder(config), lambda model: model(**inputs)[0]


def nemotron():
    transformers = pytest.importorskip("transformers")
    folder = "transformers.models.nemotron_asr_streaming"
    module = pytest.importorskip(f"{folder}.configuration_nemotron_asr_streaming")
    config = module.NemotronAsrStreamingEncoderConfig(**SIZES, **STILL, sliding_window=15)
    inputs = _features()
    return transformers.NemotronAsrStreamingEncoder(config), lambda model: model(**inputs)[0]


def nemo():
    sizes = {"feat_in": 16, "n_layers": 2, "d_model": 24, "n_heads": 3, "ff_expansion_factor": 2}
    front = {"subsampling": "dw_striding", "subsampling_factor": 8, "subsampling_conv_channels": 8}
    made = nemo_encoder.load().ConformerEncoder(**sizes, **front, conv_kernel_size=5)
    x, lengths = torch.randn(3, 16, 75, generator=numbers(1)), torch.tensor([75, 50, 9])
    return made, lambda model: model(audio_signal=x, length=lengths)[0]


IN_INT8 = zipformer, e_branchformer, emformer, emformer_rnnt, mega
ALL = *IN_INT8, emformer_stream, rotary_mega, parakeet, nemotron, nemo
