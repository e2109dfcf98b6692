# SPDX-License-Identifier: Apache-2.0
"""Rules for the convolutions on the waveform in transformers' wav2vec 2.0 and its relatives, and for those whose
results are added as positions."""

from functools import partial

from fastasr.swap.forwards import waveforms as models
from fastasr.swap.rule import Known, Rule, holds
from fastasr.swap.rules.transformers_parakeet import ACTIVATIONS

_holds = partial(holds, "activation", "conv", activation=ACTIVATIONS)
_layer = partial(Rule, forward=models.convolution, structure=_holds())
_norm_layer = partial(
    Rule, forward=models.norm_convolution, kernels=("norm_activation",), structure=_holds("layer_norm")
)
_group_norm_layer = partial(
    _norm_layer, forward=models.group_norm_convolution, kernels=("batch_norm_activation",)
)
_of_positions = partial(Rule, release=models.release)
_positions = partial(
    _of_positions, forward=models.positions, structure=_holds("padding", optional=("batch_norm",))
)
_sew_positions = partial(_of_positions, forward=models.sew_positions, structure=_holds("padding"))
_data2vec_positions = partial(
    Rule, forward=models.data2vec_positions, structure=_holds("padding", "layer_norm")
)
_omniasr_positions = partial(_of_positions, forward=models.omniasr_positions, structure=_holds())

_KINDS = "NoLayerNormConvLayer", "LayerNormConvLayer", "GroupNormConvLayer", "PositionalConvEmbedding"
# Name -> the fingerprints of its classes of these kinds
_PRINTS = {
    "Wav2Vec2": (
        "afd35e5da614411a8dcd0426",
        "027750875144c79f2beee0f2",
        "c90473e727dfbcbfded7a340",
        "85c793263806b14bb7ff70e0",
    ),
    "Hubert": (
        "d12327ecb2613948728e873e",
        "370e5b8710d2f7db89b81a38",
        "e9d5114c503f65927a03ca18",
        "17a4e714fbe475230e7408f5",
    ),
    "WavLM": (
        "e8f74a3ff587304ba3c6f6d3",
        "a2df0e98bef6da63b3d10672",
        "fb34ad8d7a6f381bfa57c878",
        "e86b2d963aa0bb85e7b3ba61",
    ),
    "Wav2Vec2Conformer": (
        "bbf2bad0cb8b938720a3c608",
        "eb0e386d9b6a2b171a602190",
        "7ed13b484b8d63d5cf9925a9",
        "4160b2afecb97780b97f2be6",
    ),
    "UniSpeech": (
        "711486fb227d070a470d659a",
        "16fda134674837f99dca9392",
        "cb1223c2fd273a1f8be21261",
        "e78abd65d57426fd8b479c9d",
    ),
    "UniSpeechSat": (
        "b11fb662e62ec541e976ec70",
        "f84dcca726e873d54ee0fcdd",
        "ddd424811f76abe8006492cb",
        "27110a0cd335ea4f7626fe63",
    ),
    "SEW": (
        "50a50726269151f791fdc1ac",
        "cbca21e6127b9720fde2d9d3",
        "7d0897d203d65f145748f816",
        "56a31b7695c7fb153608e702",
    ),
    "SEWD": (
        "68c7eb4626679f3c792760d4",
        "42f6f73d97a3846d6230e6f7",
        "0e55cc25a500711db2047c9e",
        "8ad6abe599ac68a73032bc73",
    ),
    "SpeechT5": (
        "44b7bcc955595fc82b0ad3cb",
        "1c664acbcacdfb0d86fd7dfc",
        "2f0c2f23ace2c4b8fd9c29dc",
        "a331a621f8831780b20af116",
    ),
}

_MADE = {
    **{
        f"{name}{kind}": (made, value)
        for name, values in _PRINTS.items()
        for kind, made, value in zip(
            _KINDS,
            (
                _layer,
                _norm_layer,
                _group_norm_layer,
                _sew_positions if name.startswith("SEW") else _positions,
            ),
            values,
            strict=True,
        )
    },
    "Data2VecAudioConvLayer": (_norm_layer, "5cdc6e2a4a4f6a24ec1de20d"),
    "Data2VecAudioPositionalConvLayer": (_data2vec_positions, "f4caaac94172b61d6fff85f1"),
    "OmniASRLayerNormConvLayer": (_norm_layer, "e78e60248b31d2a7b98bda10"),
    "OmniASRPositionalConvEmbedding": (_omniasr_positions, "3b0ee39cf1170bf8a27e5923"),
}

RULES = tuple(
    made(
        name=f"transformers.{name}",
        class_name=name,
        known={
            value: Known("transformers 5.24" if name.startswith("OmniASR") else "transformers 5.12 to 5.24")
        },
    )
    for name, (made, value) in _MADE.items()
)
