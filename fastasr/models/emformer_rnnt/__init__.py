# SPDX-License-Identifier: Apache-2.0
"""torchaudio's RNN-T, one file per part: transcriber (an Emformer), predictor (LSTMs with LayerNorm), joiner.

``emformer_rnnt_model`` and ``emformer_rnnt_base`` build it as ``torchaudio.models`` does, with the same state dict.
"""

from fastasr.models.emformer_rnnt.joiner import Joiner
from fastasr.models.emformer_rnnt.model import RNNT, emformer_rnnt_base, emformer_rnnt_model
from fastasr.models.emformer_rnnt.predictor import CustomLSTM, Predictor
from fastasr.models.emformer_rnnt.transcriber import EmformerEncoder, TimeReduction

__all__ = [
    "RNNT",
    "CustomLSTM",
    "EmformerEncoder",
    "Joiner",
    "Predictor",
    "TimeReduction",
    "emformer_rnnt_base",
    "emformer_rnnt_model",
]
