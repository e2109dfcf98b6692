# SPDX-License-Identifier: Apache-2.0
"""The recogniser around a Zipformer encoder, one file per concept: decoder, joiner, CTC, attention decoder, losses and
symbol table, as icefall's ``AsrModel`` combines them."""

from fastasr.asr.recogniser.absolute_position import PositionalEncoding
from fastasr.asr.recogniser.asr_model import AsrModel
from fastasr.asr.recogniser.attention_decoder import (
    AttentionDecoderModel,
    DecoderLayer,
    Swish,
    TransformerDecoder,
)
from fastasr.asr.recogniser.ctc import CtcLoss
from fastasr.asr.recogniser.decoder import Decoder
from fastasr.asr.recogniser.joiner import Joiner
from fastasr.asr.recogniser.label_smoothing import LabelSmoothingLoss
from fastasr.asr.recogniser.multi_head_attention import MultiHeadAttention
from fastasr.asr.recogniser.symbol_table import SymbolTable, num_tokens, token_ids_to_text
from fastasr.asr.recogniser.time_warp import time_warp
from fastasr.models.common.sequences import make_pad_mask, pad_sequences, subsequent_mask
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
