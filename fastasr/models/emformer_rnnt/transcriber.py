# SPDX-License-Identifier: Apache-2.0
"""The transcription network: a linear layer, stacking of frames, an Emformer, a linear layer, LayerNorm."""

from torch import Tensor, nn

from fastasr.models.common import plumbing
from fastasr.models.emformer import Emformer
from fastasr.models.emformer_rnnt.predictor import State


class TimeReduction(nn.Module):
    """Joins every ``stride`` frames to one: (B, T, D) to (B, T // stride, D * stride). Left-over frames are dropped."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, input: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        frames = input.shape[1] // self.stride
        stacked = input[:, : frames * self.stride].reshape(input.shape[0], frames, -1)
        return stacked, lengths.div(self.stride, rounding_mode="trunc")


class EmformerEncoder(nn.Module):
    """Features (B, T, input_dim) to encodings (B, T // time_reduction_stride, output_dim).

    Lengths are in frames of features; the other arguments are those of :class:`fastasr.models.emformer.Emformer`.
    """

    def __init__(
        self,
        *,
        input_dim: int,
        output_dim: int,
        segment_length: int,
        right_context_length: int,
        time_reduction_input_dim: int,
        time_reduction_stride: int,
        transformer_num_heads: int,
        transformer_ffn_dim: int,
        transformer_num_layers: int,
        transformer_left_context_length: int,
        transformer_dropout: float = 0.0,
        transformer_activation: str = "relu",
        transformer_max_memory_size: int = 0,
        transformer_weight_init_scale_strategy: str | None = "depthwise",
        transformer_tanh_on_mem: bool = False,
    ) -> None:
        super().__init__()
        self.input_linear = nn.Linear(input_dim, time_reduction_input_dim, bias=False)
        self.time_reduction = TimeReduction(time_reduction_stride)
        width = time_reduction_input_dim * time_reduction_stride
        self.transformer = Emformer(
            width,
            transformer_num_heads,
            transformer_ffn_dim,
            transformer_num_layers,
            segment_length // time_reduction_stride,
            dropout=transformer_dropout,
            activation=transformer_activation,
            left_context_length=transformer_left_context_length,
            right_context_length=right_context_length // time_reduction_stride,
            max_memory_size=transformer_max_memory_size,
            weight_init_scale_strategy=transformer_weight_init_scale_strategy,
            tanh_on_mem=transformer_tanh_on_mem,
        )
        self.output_linear = nn.Linear(width, output_dim)
        self.layer_norm = nn.LayerNorm(output_dim)

    def forward(self, input: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes whole utterances, each followed by its right context, which lengths (B,) do not count."""
        x, lengths = self.time_reduction(plumbing.linear(self.input_linear, input), lengths)
        x, lengths = self.transformer(x, lengths)
        return self.layer_norm(plumbing.linear(self.output_linear, x)), lengths

    def infer(self, input: Tensor, lengths: Tensor, states: State | None) -> tuple[Tensor, Tensor, State]:
        """Encodes the next segment of a stream, followed by its right context, which lengths (B,) count."""
        x, lengths = self.time_reduction(plumbing.linear(self.input_linear, input), lengths)
        x, lengths, states = self.transformer.infer(x, lengths, states)
        return self.layer_norm(plumbing.linear(self.output_linear, x)), lengths, states
