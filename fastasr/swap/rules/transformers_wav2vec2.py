# SPDX-License-Identifier: Apache-2.0
"""Rules for the encoders of transformers' wav2vec 2.0, HuBERT, UniSpeech, UniSpeech-SAT, data2vec-audio, SEW and
OmniASR, which have one code: Whisper's attention and Wav2Vec2Conformer's feed-forward."""

from fastasr.swap.forwards import layers
from fastasr.swap.rule import Known
from fastasr.swap.rules.conformer import FROM_5_18, layer_rule
from fastasr.swap.rules.transformers_conformer import WAV2VEC2_FEED_FORWARD
from fastasr.swap.rules.transformers_whisper import ATTENTION

_SINCE_5_24 = Known("transformers 5.24")

# Name -> the fingerprints of its attention and its feed-forward, and the versions that have them
_PRINTS = {
    "Wav2Vec2": ("e733b56b08447a91c8a73007", "1be774cdc5fd7b0697d4c921", FROM_5_18),
    "Hubert": ("0731ccd50dc59d5ac78b1abe", "555c87ddaf128358856f9c8a", FROM_5_18),
    "UniSpeech": ("432ac8fc4b238929d09877b3", "9b7b61e1ebddae58f34d15dd", FROM_5_18),
    "UniSpeechSat": ("8284d61df31f9de96482d222", "4c2187488c6f0c28b56d11e0", FROM_5_18),
    "Data2VecAudio": ("b04e26fd47aa93011d2a377c", "132b958379c6d92e23f3d6c0", FROM_5_18),
    "SEW": ("9fb40be3638393f411f0530c", "70dc9866e9d74b61dcf3e448", FROM_5_18),
    "OmniASR": ("e0756dcf5cce431945258eb2", "1dbdb91268d85e79a8497295", _SINCE_5_24),
}

_LAYERS = {
    "Wav2Vec2EncoderLayer": "e7ebd70b9976cf3c7a5fca8e",
    "Wav2Vec2EncoderLayerStableLayerNorm": "aa68cac51378dfdfe5c3486e",
    "HubertEncoderLayer": "43a53f33c6aa1b552f59a360",
    "HubertEncoderLayerStableLayerNorm": "ca6b7cf926b01e0e39ed6358",
    "UniSpeechEncoderLayer": "aece3dbac09e0a220ccb68fe",
    "UniSpeechEncoderLayerStableLayerNorm": "6bc161dd395b84399c6b6ac2",
    "UniSpeechSatEncoderLayer": "741468f338b6d8a362d8e057",
    "UniSpeechSatEncoderLayerStableLayerNorm": "ddca1465b14474441b0cd553",
    "Data2VecAudioEncoderLayer": "6e4690786796d112524f7793",
    "SEWEncoderLayer": "b13b86cfc45350798ebc2e43",
    "OmniASREncoderLayer": "442180aadaa118b002025e40",
}

RULES = (
    *(
        rule.like(f"transformers.{name}{part}", f"{name}{part}", {value: known})
        for name, (attention, feed_forward, known) in _PRINTS.items()
        for rule, part, value in (
            (ATTENTION, "Attention", attention),
            (WAV2VEC2_FEED_FORWARD, "FeedForward", feed_forward),
        )
    ),
    *(
        layer_rule(
            f"transformers.{name}",
            name,
            layers.wav2vec2_layer,
            {value: _SINCE_5_24 if name.startswith("OmniASR") else FROM_5_18},
        )
        for name, value in _LAYERS.items()
    ),
)
