# SPDX-License-Identifier: Apache-2.0
"""Rules for the encoders of transformers' wav2vec 2.0, HuBERT, UniSpeech, UniSpeech-SAT, data2vec-audio, SEW and
OmniASR, which have one code: Whisper's attention and Wav2Vec2Conformer's feed-forward."""

from fastasr.swap.rule import Known
from fastasr.swap.rules.conformer import FROM_5_18
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

RULES = tuple(
    rule.like(f"transformers.{name}{part}", f"{name}{part}", {value: known})
    for name, (attention, feed_forward, known) in _PRINTS.items()
    for rule, part, value in (
        (ATTENTION, "Attention", attention),
        (WAV2VEC2_FEED_FORWARD, "FeedForward", feed_forward),
    )
)
