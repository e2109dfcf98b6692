# SPDX-License-Identifier: Apache-2.0
"""The recipe's recognisers with other encoders than the Zipformer. They have the heads of ``AsrModel``: a
transducer with its stateless prediction network, and CTC.

    Emformer         Zipformer's convolutional front end, pairs of its frames joined, Emformer; it can stream
    E-Branchformer   ESPnet's encoder with its convolutional input layer; it reads whole recordings

A frame of their output is 40 ms, as for the Zipformer.
"""

import abc
from typing import Any

import torch
from torch import Tensor

from fastasr.asr.decoding.chunks import RIGHT_CONTEXT, SILENCE
from fastasr.asr.recogniser.ctc import CtcLoss
from fastasr.asr.recogniser.decoder import Decoder
from fastasr.asr.recogniser.joiner import Joiner
from fastasr.models.common.sequences import pad_sequences
from fastasr.models.e_branchformer import EBranchformerEncoder
from fastasr.models.emformer import Emformer
from fastasr.models.emformer_rnnt.transcriber import TimeReduction
from fastasr.models.transducer.transducer_loss import TransducerLoss
from fastasr.models.zipformer.initial_scale import ScaledLinear
from fastasr.models.zipformer.schedules import ScheduledFloat
from fastasr.models.zipformer.subsampling import Conv2dSubsampling

FRAMES = 4  # frames of features per frame of output
MEAN, DEVIATION = -6.0, 5.0  # normalise the prompts' features for a front end that does not normalise
AHEAD = 3  # future frames of the front end that its ConvNeXt layer sees


class Transducer(TransducerLoss, CtcLoss, torch.nn.Module, abc.ABC):
    """The heads behind an ``encoder``, and their losses. A subclass makes the encoder and defines ``forward_encoder``,
    ``stream`` and ``upstream_encoder``.

    Args:
        width: channels of the encoder's output.
        vocab_size: number of tokens; 0 is blank. decoder_dim, context_size, joiner_dim: as for AsrModel.
    """

    def __init__(
        self, width: int, vocab_size: int, decoder_dim: int, joiner_dim: int, context_size: int
    ) -> None:
        super().__init__()
        self.blank_id, self.vocab_size = 0, vocab_size
        self.decoder = Decoder(vocab_size, decoder_dim, self.blank_id, context_size)
        self.joiner = Joiner(width, decoder_dim, joiner_dim, vocab_size)
        self.simple_am_proj = ScaledLinear(width, vocab_size, initial_scale=0.25)
        self.simple_lm_proj = ScaledLinear(decoder_dim, vocab_size, initial_scale=0.25)
        self.ctc_output = torch.nn.Sequential(
            torch.nn.Dropout(p=0.1), torch.nn.Linear(width, vocab_size), torch.nn.LogSoftmax(dim=-1)
        )

    def forward(
        self, x: Tensor, x_lens: Tensor, y: list[list[int]], lm_scale: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features (batch, time, bins), lengths, a list of tokens per sequence -> (simple, pruned, CTC) losses."""
        encoder_out, lengths = self.forward_encoder(x, x_lens)
        simple, pruned = self.forward_transducer(encoder_out, lengths, y, lm_scale=lm_scale)
        return simple, pruned, self.forward_ctc(encoder_out, lengths, *pad_sequences(y, 0))

    @abc.abstractmethod
    def forward_encoder(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Features (batch, time, bins) -> (batch, frames, channels), lengths."""

    @abc.abstractmethod
    def stream(self, ctc: bool = False) -> Any:
        """Returns a ``decoding.ChunkEncoder`` of this model for one stream. Raises ValueError if it cannot stream."""

    @abc.abstractmethod
    def upstream_encoder(self) -> Any:
        """Returns upstream's encoder with the parameters of ``encoder``. Raises ImportError without its package."""


class EmformerTransducer(Transducer):
    """A transducer with an Emformer. Its own arguments are ``front_dim``, half of the Emformer's channels, and those of
    the Emformer, with lengths in frames of output."""

    NAME, PACKAGE = "an Emformer", "torchaudio"

    def __init__(
        self,
        feature_dim: int,
        vocab_size: int,
        front_dim: int,
        decoder_dim: int,
        joiner_dim: int,
        context_size: int,
        dropout: float = 0.1,
        **emformer: Any,
    ) -> None:
        width = 2 * front_dim
        super().__init__(width, vocab_size, decoder_dim, joiner_dim, context_size)
        self.encoder_embed = Conv2dSubsampling(
            feature_dim, front_dim, dropout=ScheduledFloat((0.0, 0.3), (20000.0, 0.1))
        )
        self.reduction = TimeReduction(2)
        self._arguments = {"input_dim": width, "dropout": dropout, "activation": "gelu", **emformer}
        self.encoder = Emformer(**self._arguments)

    def forward_encoder(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        lengths = (x_lens + (FRAMES - 1)) // FRAMES
        right = self.encoder.right_context_length
        # Silence follows the longest sequence, as at the end of a stream.
        frames = FRAMES * (int(lengths.max()) + right) + RIGHT_CONTEXT
        x = torch.nn.functional.pad(x, (0, 0, 0, frames - x.shape[1]), value=SILENCE)
        front, _ = self.encoder_embed(x, torch.full_like(x_lens, frames))
        front, lengths = self.reduction(front[:, :-AHEAD], 2 * lengths)
        return self.encoder(front, lengths)

    def stream(self, ctc: bool = False) -> "EmformerStream":
        return EmformerStream(self, ctc)

    def upstream_encoder(self) -> Any:
        from torchaudio.models import Emformer as Upstream

        return _with_parameters(Upstream(**self._arguments), self.encoder)


class EmformerStream:
    """Encodes the chunks of one stream, as ``decoding.ChunkEncoder`` does. A chunk is one segment of the Emformer.

    A chunk ends with the features of the segment's right context. The next chunk begins where the segment ends, so the
    front end's cache is taken at that place.
    """

    def __init__(self, model: Any, ctc: bool = False) -> None:
        self.model, self.head = model, model.ctc_output if ctc else None
        self.chunk_size = 2 * model.encoder.segment_length  # in frames of the front end
        self.right_context = RIGHT_CONTEXT + FRAMES * model.encoder.right_context_length
        self.states = None
        self.cache = model.encoder_embed.get_init_states(1, next(model.parameters()).device)

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        """(1, 2 chunk_size + right_context, bins) -> (1, chunk_size / 2, channels)."""
        embed, encoder = self.model.encoder_embed, self.model.encoder
        maps = embed.conv(x.unsqueeze(1))  # [1, C, T, F]
        front, _ = embed.convnext.streaming_forward(maps, self.cache)
        self.cache = torch.cat([self.cache, maps], dim=2)[:, :, self.chunk_size : self.chunk_size + AHEAD]
        front = embed.out_norm(embed.out(front.transpose(1, 2).flatten(2)))
        front, lengths = self.model.reduction(
            front, torch.tensor([front.shape[1]], device=x.device, dtype=torch.int64)
        )
        y, _, self.states = encoder.infer(front, lengths, self.states)
        return y if self.head is None else self.head(y)


class EBranchformerTransducer(Transducer):
    """A transducer with an E-Branchformer. Its own arguments are those of ESPnet's encoder."""

    NAME, PACKAGE = "an E-Branchformer", "espnet"

    def __init__(
        self,
        feature_dim: int,
        vocab_size: int,
        output_size: int,
        decoder_dim: int,
        joiner_dim: int,
        context_size: int,
        dropout: float = 0.1,
        **e_branchformer: Any,
    ) -> None:
        super().__init__(output_size, vocab_size, decoder_dim, joiner_dim, context_size)
        self._arguments = {
            "input_size": feature_dim,
            "output_size": output_size,
            **e_branchformer,
            "dropout_rate": dropout,
            "positional_dropout_rate": dropout,
            "attention_dropout_rate": dropout,
            "use_ffn": True,
            "macaron_ffn": True,
            "attention_layer_type": "rel_selfattn",
            "pos_enc_layer_type": "rel_pos",
            "rel_pos_type": "latest",
        }
        self.encoder = EBranchformerEncoder(**self._arguments)

    def forward_encoder(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        y, lengths, _ = self.encoder((x - MEAN) / DEVIATION, x_lens)
        return y, lengths

    def stream(self, ctc: bool = False) -> Any:
        raise ValueError("an E-Branchformer reads whole recordings: it has no streams")

    def upstream_encoder(self) -> Any:
        from espnet2.asr.encoder.e_branchformer_encoder import EBranchformerEncoder as Upstream

        return _with_parameters(Upstream(**self._arguments), self.encoder)


def _with_parameters(made: Any, of: Any) -> Any:
    made.load_state_dict(of.state_dict())
    return made


TRANSDUCERS: dict[str, Any] = {"emformer": EmformerTransducer, "e_branchformer": EBranchformerTransducer}
