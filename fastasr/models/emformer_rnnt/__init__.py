# SPDX-License-Identifier: Apache-2.0
"""torchaudio's RNN-T, one file per part: transcriber (an Emformer), predictor (LSTMs with LayerNorm), joiner.

``emformer_rnnt_model`` and ``emformer_rnnt_base`` build it as ``torchaudio.models`` does, with the same state dict.
"""

from fastasr.models.emformer_rnnt.joiner import Joiner
from fastasr.models.emformer_rnnt.model import RNNT
from fastasr.models.emformer_rnnt.predictor import CustomLSTM, Predictor

__all__ = ["RNNT", "CustomLSTM", "Joiner", "Predictor"]
