# SPDX-License-Identifier: Apache-2.0
"""The encoder: input layer, positional encoding, layers, norm."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from fastasr.models.e_branchformer import row
from fastasr.models.e_branchformer.layer import EBranchformerLayer
from fastasr.models.e_branchformer.positional_encoding import RelPositionalEncoding
from fastasr.models.e_branchformer.subsampling import CONVOLUTIONS, Conv2dSubsampling
from fastasr.packed_frames import PackedFrames


class EBranchformerEncoder(torch.nn.Module):
    """ESPnet's ``EBranchformerEncoder`` with relative positions ("rel_pos", "rel_selfattn", "latest").

    It takes ESPnet's arguments and loads its state dicts. ``input_layer`` is "conv2d", "conv2d1", "conv2d2",
    "conv2d6", "conv2d8", "linear", "embed", a module, or None. Raises ValueError for any other value of these options.

    With ``encoder.ragged = True`` it computes nothing for padding, see ``row``.
    """

    ragged = False

    def __init__(
        self,
        input_size: int,
        output_size: int = 256,
        attention_heads: int = 4,
        attention_layer_type: str = "rel_selfattn",
        pos_enc_layer_type: str = "rel_pos",
        rel_pos_type: str = "latest",
        cgmlp_linear_units: int = 2048,
        cgmlp_conv_kernel: int = 31,
        use_linear_after_conv: bool = False,
        gate_activation: str | torch.nn.Module = "identity",
        num_blocks: int = 12,
        dropout_rate: float = 0.1,
        positional_dropout_rate: float = 0.1,
        attention_dropout_rate: float = 0.0,
        input_layer: str | torch.nn.Module | None = "conv2d",
        zero_triu: bool = False,
        padding_idx: int = -1,
        layer_drop_rate: float = 0.0,
        max_pos_emb_len: int = 5000,
        use_ffn: bool = False,
        macaron_ffn: bool = False,
        ffn_activation_type: str | torch.nn.Module = "swish",
        linear_units: int = 2048,
        positionwise_layer_type: str = "linear",
        merge_conv_kernel: int = 3,
        interctc_layer_idx: list[int] | None = None,
        interctc_use_conditioning: bool = False,
        qk_norm: bool = False,
        use_flash_attn: bool = True,
        gradient_checkpoint_layers: Sequence[int] = (),
    ) -> None:
        super().__init__()
        for name, value, expected in (
            ("attention_layer_type", attention_layer_type, "rel_selfattn"),
            ("pos_enc_layer_type", pos_enc_layer_type, "rel_pos"),
            ("rel_pos_type", rel_pos_type, "latest"),
            ("positionwise_layer_type", positionwise_layer_type, "linear"),
        ):
            if value != expected:
                raise ValueError(f"EBranchformerEncoder: {name}: expected {expected!r}, got {value!r}")
        self._output_size = output_size
        positions = RelPositionalEncoding(output_size, positional_dropout_rate, max_pos_emb_len)
        self.embed = _input_layer(input_layer, input_size, output_size, dropout_rate, padding_idx, positions)
        self.encoders = torch.nn.Sequential(
            *(
                EBranchformerLayer(
                    output_size,
                    ff_dim=linear_units,
                    ff_activation=ffn_activation_type,
                    dropout=dropout_rate,
                    num_heads=attention_heads,
                    att_dropout=attention_dropout_rate,
                    cgmlp_ff_dim=cgmlp_linear_units // 2,
                    cgmlp_conv_kernel=cgmlp_conv_kernel,
                    merge_conv_kernel=merge_conv_kernel,
                    use_ffn=use_ffn,
                    macaron=macaron_ffn,
                    zero_triu=zero_triu,
                    cgmlp_options={
                        "gate_activation": gate_activation,
                        "use_linear_after_conv": use_linear_after_conv,
                    },
                )
                for _ in range(num_blocks)
            )
        )
        self.after_norm = torch.nn.LayerNorm(output_size, eps=1e-12)
        self.layer_drop_rate = layer_drop_rate
        self.interctc_layer_idx = list(interctc_layer_idx or [])
        if self.interctc_layer_idx and not (
            min(self.interctc_layer_idx) > 0 and max(self.interctc_layer_idx) < num_blocks
        ):
            raise ValueError(
                f"EBranchformerEncoder: interctc_layer_idx: expected layers from 1 to {num_blocks - 1}, got "
                f"{interctc_layer_idx}"
            )
        self.interctc_use_conditioning = interctc_use_conditioning
        self.conditioning_layer: Any = None  # ESPnet's model sets it
        self.gradient_checkpoint_layers = list(gradient_checkpoint_layers)

    def output_size(self) -> int:
        return self._output_size

    def _call(self, number: int, module: torch.nn.Module, *arguments: Any) -> Any:
        """Calls layer ``number`` (0: the input layer), with activation checkpointing if that is configured."""
        if number in self.gradient_checkpoint_layers:
            return torch.utils.checkpoint.checkpoint(module, *arguments, use_reentrant=False)
        return module(*arguments)

    def forward(
        self,
        xs_pad: Tensor | PackedFrames,
        ilens: Tensor,
        prev_states: object = None,
        masks: Tensor | None = None,
        ctc: Any = None,
        max_layer: int | None = None,
        return_all_hs: bool = False,
    ) -> tuple[Tensor | tuple[Tensor, list[Any]], Tensor, None] | PackedFrames:
        """xs_pad (B, L, input_size), ilens (B,) -> (encoded (B, T, output_size), lengths (B,), None).

        masks (B, L), True at padding, may replace ilens. If intermediate outputs are asked for, the first result is a
        pair of the encoding and these.

        With ``ragged`` a recording's frames and their number are those of the recording alone. Then it also takes
        PackedFrames (N, input_size) and their lengths, and returns PackedFrames (N', output_size).
        """
        if self.ragged or isinstance(xs_pad, PackedFrames):
            call = xs_pad, ilens, prev_states, masks, ctc, max_layer, return_all_hs
            found = row.without_padding(self, *call)
            if found is not None:
                return found
        if masks is None:
            frames = torch.arange(
                xs_pad.shape[1] if xs_pad.dim() > 1 else 0, device=xs_pad.device, dtype=torch.int64
            )
            masks = (frames < ilens.to(xs_pad.device).unsqueeze(1)).unsqueeze(1)
            masks = masks[:, :, : int(ilens.max())]
        else:
            masks = ~masks[:, None, :]
        if isinstance(self.embed, Conv2dSubsampling):
            x, masks = self._call(0, self.embed, xs_pad, masks)
        else:
            x = self._call(0, self.embed, xs_pad)
        outputs: list[Any] = []  # encodings, or pairs of a layer and its encoding
        for i, layer in enumerate(self.encoders, 1):
            if max_layer is not None and i > max_layer:
                break
            if self.training and torch.empty(1).uniform_().item() < self.layer_drop_rate:
                continue
            x, masks = self._call(i, layer, x, masks)
            if return_all_hs:
                outputs.append(_encoded(x))
            elif i in self.interctc_layer_idx:
                outputs.append((i, _encoded(x)))
                if self.interctc_use_conditioning:
                    condition = self.conditioning_layer(ctc.softmax(_encoded(x)))
                    x = (x[0] + condition, *x[1:]) if isinstance(x, tuple) else x + condition
        x = self.after_norm(_encoded(x))
        lengths = masks.squeeze(1).sum(1)
        return ((x, outputs) if outputs else x), lengths, None


def _encoded(x: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return x[0] if isinstance(x, tuple) else x


def _input_layer(
    kind: str | torch.nn.Module | None,
    input_size: int,
    output_size: int,
    dropout_rate: float,
    padding_idx: int,
    positions: RelPositionalEncoding,
) -> torch.nn.Module:
    if isinstance(kind, torch.nn.Module):
        return torch.nn.Sequential(kind, positions)
    if kind is None:
        if input_size == output_size:
            return torch.nn.Sequential(positions)
        return torch.nn.Linear(input_size, output_size)
    if kind == "linear":
        return torch.nn.Sequential(
            torch.nn.Linear(input_size, output_size),
            torch.nn.LayerNorm(output_size),
            torch.nn.Dropout(dropout_rate),
            positions,
        )
    if kind == "embed":
        return torch.nn.Sequential(
            torch.nn.Embedding(input_size, output_size, padding_idx=padding_idx), positions
        )
    if kind not in CONVOLUTIONS:
        raise ValueError(
            f"EBranchformerEncoder: input_layer: expected one of {', '.join(CONVOLUTIONS)}, linear, embed, a module or "
            f"None, got {kind!r}"
        )
    return Conv2dSubsampling(input_size, output_size, positions, CONVOLUTIONS[kind])
