# SPDX-License-Identifier: Apache-2.0
"""Forward passes for the modules of other packages' Conformers (Gulati et al., "Conformer", 2020), which the swap binds
to them. A Conformer of fastasr's own is :mod:`fastasr.models.fast_conformer`."""

from fastasr.swap.forwards.attention import (
    fastspeech2_attention,
    granite_speech5_attention,
    granite_speech_attention,
    nemo_attention,
    nemo_local_attention,
    nemo_transformer_attention,
    relative_key_attention,
    speechbrain_attention,
    wav2vec2_attention,
    wavlm_attention,
    wavlm_encoder,
)
from fastasr.swap.forwards.convolution import (
    causal_seamless_convolution,
    espnet_convolution,
    fastspeech2_convolution,
    fun_asr_memory,
    granite_speech5_convolution,
    granite_speech_convolution,
    nemo_convolution,
    seamless_convolution,
    speechbrain_convolution,
    torchaudio_convolution,
    wav2vec2_convolution,
)
from fastasr.swap.forwards.feed_forward import (
    fun_asr_feed_forward,
    granite_speech_feed_forward,
    nemo_feed_forward,
    nemo_transformer_feed_forward,
    speechbrain_feed_forward,
    torchaudio_feed_forward,
    wav2vec2_feed_forward,
)
from fastasr.swap.forwards.subsampling import nemo_subsampling, phi4_subsampling

__all__ = [
    "causal_seamless_convolution",
    "espnet_convolution",
    "fastspeech2_attention",
    "fastspeech2_convolution",
    "fun_asr_feed_forward",
    "fun_asr_memory",
    "granite_speech5_attention",
    "granite_speech5_convolution",
    "granite_speech_attention",
    "granite_speech_convolution",
    "granite_speech_feed_forward",
    "nemo_attention",
    "nemo_convolution",
    "nemo_feed_forward",
    "nemo_local_attention",
    "nemo_subsampling",
    "nemo_transformer_attention",
    "nemo_transformer_feed_forward",
    "phi4_subsampling",
    "relative_key_attention",
    "seamless_convolution",
    "speechbrain_attention",
    "speechbrain_convolution",
    "speechbrain_feed_forward",
    "torchaudio_convolution",
    "torchaudio_feed_forward",
    "wav2vec2_attention",
    "wav2vec2_convolution",
    "wav2vec2_feed_forward",
    "wavlm_attention",
    "wavlm_encoder",
]
