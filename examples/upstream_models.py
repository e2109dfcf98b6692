# SPDX-License-Identifier: Apache-2.0
"""Small upstream models, and inputs for each, for ``fastasr swap`` in this folder:

    fastasr swap upstream_models:transformers_parakeet --input upstream_models:features_and_mask
    fastasr swap upstream_models:speechbrain_conformer --input upstream_models:hidden_states
    fastasr swap upstream_models:torchaudio_rnnt --input upstream_models:torchaudio_batch
    fastasr swap upstream_models:torchaudio_emformer --input upstream_models:torchaudio_frames
    fastasr swap upstream_models:espnet_e_branchformer --input upstream_models:features
    fastasr swap upstream_models:espnet_mega_decoder --input upstream_models:labels
    fastasr swap upstream_models:zipformer --input upstream_models:frames
    python upstream_models.py       # RETURNN's E-Branchformer is converted, not swapped

Replace the functions by your own, with your configuration and checkpoint.
"""

import torch

RIGHT_CONTEXT = 4  # frames of features


# --------------------------------------------------------------------------- transformers
def transformers_parakeet():
    """Returns a small Parakeet with a CTC head. ``ParakeetForCTC.from_pretrained(folder)`` reads one of yours."""
    from transformers import ParakeetCTCConfig, ParakeetEncoderConfig, ParakeetForCTC

    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    encoder = ParakeetEncoderConfig(num_mel_bins=80, subsampling_conv_channels=32, **sizes)
    return ParakeetForCTC(ParakeetCTCConfig(vocab_size=30, pad_token_id=29, encoder_config=encoder)).eval()


def features_and_mask():
    """Returns features and their mask, 1 at valid frames."""
    mask = torch.arange(200) < torch.tensor([[200], [150]])
    return {"input_features": torch.randn(2, 200, 80), "attention_mask": mask.long()}


# --------------------------------------------------------------------------- SpeechBrain
def speechbrain_conformer():
    """Returns a small Conformer encoder. A ``TransformerASR`` holds one as ``model.encoder``."""
    from speechbrain.lobes.models.transformer.Conformer import ConformerEncoder

    return ConformerEncoder(num_layers=2, d_model=64, d_ffn=128, nhead=4).eval()


def hidden_states():
    """Returns what the encoder takes: hidden states, the mask of padding and the position embeddings."""
    from speechbrain.nnet.attention import RelPosEncXL

    hidden, lengths = torch.randn(2, 60, 64), torch.tensor([[60], [45]])
    padding = torch.arange(60) >= lengths
    return {"src": hidden, "src_key_padding_mask": padding, "pos_embs": RelPosEncXL(64)(hidden)}


# --------------------------------------------------------------------------- torchaudio
def torchaudio_rnnt():
    """Returns an RNN-T with an Emformer, a small ``emformer_rnnt_base``."""
    from torchaudio.models import emformer_rnnt_model

    return emformer_rnnt_model(
        input_dim=80,
        encoding_dim=96,
        num_symbols=30,
        segment_length=16,
        right_context_length=RIGHT_CONTEXT,
        time_reduction_input_dim=32,
        time_reduction_stride=4,
        transformer_num_heads=4,
        transformer_ffn_dim=256,
        transformer_num_layers=3,
        transformer_dropout=0.1,
        transformer_activation="gelu",
        transformer_left_context_length=30,
        transformer_max_memory_size=0,
        transformer_weight_init_scale_strategy="depthwise",
        transformer_tanh_on_mem=True,
        symbol_embedding_dim=64,
        num_lstm_layers=2,
        lstm_layer_norm=True,
        lstm_layer_norm_epsilon=1e-3,
        lstm_dropout=0.3,
    ).eval()


def torchaudio_batch():
    """Returns features with their right context, lengths without it, labels, their lengths."""
    features = torch.randn(2, 100 + RIGHT_CONTEXT, 80)
    lengths = torch.tensor([100, 80], dtype=torch.int32)
    labels = torch.randint(1, 29, (2, 7), dtype=torch.int32)
    return features, lengths, labels, torch.tensor([7, 5], dtype=torch.int32)


def torchaudio_emformer():
    from torchaudio.models import Emformer

    return Emformer(
        64, 4, 128, 3, 16, left_context_length=30, right_context_length=4, max_memory_size=4
    ).eval()


def torchaudio_frames():
    """Returns frames with their right context, and lengths without it."""
    return torch.randn(2, 64 + 4, 64), torch.tensor([64, 50])


# --------------------------------------------------------------------------- ESPnet
def espnet_e_branchformer():
    from espnet2.asr.encoder.e_branchformer_encoder import EBranchformerEncoder

    sizes = {"cgmlp_linear_units": 192, "cgmlp_conv_kernel": 31, "linear_units": 128, "num_blocks": 3}
    return EBranchformerEncoder(80, 64, use_ffn=True, macaron_ffn=True, **sizes).eval()


def features():
    return torch.randn(2, 100, 80), torch.tensor([100, 75])


def espnet_mega_decoder():
    from espnet2.asr_transducer.decoder.mega_decoder import MEGADecoder

    return MEGADecoder(30, block_size=64, linear_size=128, qk_size=32, v_size=128, num_blocks=2).eval()


def labels():
    return torch.randint(1, 30, (2, 12))


# --------------------------------------------------------------------------- zipformer
def zipformer():
    from zipformer.modules.zipformer import Zipformer

    sizes = {"encoder_dim": 64, "encoder_unmasked_dim": 48, "feedforward_dim": 128, "num_encoder_layers": 1}
    return Zipformer(downsampling_factor=(1, 2), cnn_module_kernel=15, num_heads=4, **sizes).eval()


def frames():
    return torch.randn(60, 2, 64), torch.tensor([60, 45])


# --------------------------------------------------------------------------- RETURNN
def returnn_e_branchformer():
    """Returns an encoder of RETURNN's, in a configuration of its own."""
    import returnn.frontend as rf
    from returnn.frontend.encoder.conformer import ConformerEncoder
    from returnn.frontend.encoder.e_branchformer import EBranchformerLayer
    from returnn.tensor import Dim

    layer = rf.build_dict(EBranchformerLayer, ff_dim=128, num_heads=4, cgmlp_ff_dim=96)
    dims = Dim(48, name="features"), Dim(64, name="model")
    encoder = ConformerEncoder(*dims, num_layers=2, input_layer=None, encoder_layer=layer)
    for parameter in encoder.parameters():
        parameter.raw_tensor.data = 0.1 * torch.randn(parameter.raw_tensor.shape)
    return encoder


def convert():
    """Converts RETURNN's encoder to fastasr's, and its tensors back, and compares."""
    import returnn.frontend as rf
    from returnn.config import Config, global_config_ctx
    from returnn.tensor import Dim, Tensor

    from fastasr.models.e_branchformer import from_returnn, to_returnn

    rf.select_backend_torch()
    with global_config_ctx(Config({"behavior_version": 21, "rf_use_mask": False})), torch.no_grad():
        theirs = returnn_e_branchformer()
        ours = from_returnn(theirs).eval()
        x, batch, time = torch.randn(2, 50, 48), Dim(2, name="batch"), Dim(50, name="time")
        tensor = Tensor("x", [batch, time, theirs.in_dim], "float32", raw_tensor=x, feature_dim=theirs.in_dim)
        y, _ = theirs(tensor, in_spatial_dim=time)
        expected = y.copy_compatible_to_dims_raw([batch, time, theirs.out_dim])
        difference = (ours(x) - expected).abs().max().item()
        back = to_returnn(ours)
        same = sum(torch.equal(back[n], p.raw_tensor) for n, p in theirs.named_parameters())
    print(
        f"the outputs differ by {difference:.0e} at most; {same} of {len(back)} tensors come back as they were"
    )


if __name__ == "__main__":
    convert()
