# SPDX-License-Identifier: Apache-2.0
"""The recogniser around a Zipformer encoder, one file per concept: decoder, joiner, CTC, attention decoder, losses and
symbol table, as icefall's ``AsrModel`` combines them."""

from fastasr.models.transducer.absolute_position import PositionalEncoding
from fastasr.models.transducer.asr_model import AsrModel
from fastasr.models.transducer.attention_decoder import (
    AttentionDecoderModel,
    DecoderLayer,
    Swish,
    TransformerDecoder,
)
from fastasr.models.transducer.ctc import CtcLoss
from fastasr.models.transducer.decoder import Decoder
from fastasr.models.transducer.joiner import Joiner
from fastasr.models.transducer.label_smoothing import LabelSmoothingLoss
from fastasr.models.transducer.multi_head_attention import MultiHeadAttention
from fastasr.models.transducer.sequences import make_pad_mask, pad_sequences, subsequent_mask
from fastasr.models.transducer.symbol_table import SymbolTable, num_tokens, token_ids_to_text
from fastasr.models.transducer.time_warp import time_warp
from fastasr.models.transducer.transducer_loss import TransducerLoss

__all__ = [
    "AsrModel",
    "AttentionDecoderModel",
    "CtcLoss",
    "Decoder",
    "DecoderLayer",
    "Joiner",
    "LabelSmoothingLoss",
    "MultiHeadAttention",
    "PositionalEncoding",
    "Swish",
    "SymbolTable",
    "TransducerLoss",
    "TransformerDecoder",
    "make_pad_mask",
    "num_tokens",
    "pad_sequences",
    "subsequent_mask",
    "time_warp",
    "token_ids_to_text",
]
