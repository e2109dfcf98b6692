# SPDX-License-Identifier: Apache-2.0
"""The encoder without padding: its blocks run on the frames that exist, packed as ``models.common.ragged`` describes.

The blocks get a ``Packing`` where the padded encoder gives them a mask; our attention and convolution module read it.
A recording's output is what it is alone, and 0 behind its end. In training BatchNorm's statistics are those of the
frames that exist, and each dropout draws numbers for these frames alone.
"""

import torch
import torch.nn.functional as F

from fastasr.models.common import attention_dropout, plumbing
from fastasr.models.common.inference import runs
from fastasr.models.common.ragged import Packing, is_paused, warn
from fastasr.models.fast_conformer.attention import STANDARD, FastConformerAttention
from fastasr.models.fast_conformer.convolution import FastConformerConvolution
from fastasr.models.fast_conformer.subsampling import subsampled

# hooks that serve packed frames too: of FSDP, and of transformers' outputs, which record only if asked for
_HARMLESS = "torch.distributed.", "transformers.utils.output_capturing"


def obstacle(encoder) -> str | None:
    """Returns why this encoder cannot leave padding out, or None."""
    for i, layer in enumerate(encoder.layers):
        if not runs(layer.self_attn, FastConformerAttention.forward):
            return f"the attention of layer {i} is not swapped"
        if not runs(layer.conv, FastConformerConvolution.forward):
            return f"the convolution module of layer {i} is not swapped"
        if plumbing.conv_delay(layer.conv.depthwise_conv) is None:
            return f"the convolution of layer {i} is not torch's depthwise convolution"
    return None


def lengths(encoder, features, mask, reason: str | None = None) -> list[int] | None:
    """Returns the recordings' frames by the mask (B, T₀), or None where the batch has no padding to leave out, or it
    must stay, for ``reason`` or one found here, of which this function warns. Another device is waited for."""
    if mask is None or is_paused() or mask.shape != features.shape[:2]:
        return None
    found = mask.sum(-1).tolist()
    if not 0 < sum(found) < mask.numel():
        return None
    reason = reason or _obstacle_of_call(encoder)
    if reason is not None:
        warn(reason)
    return found if reason is None else None


def _obstacle_of_call(encoder):
    """Returns why a call cannot leave padding out now, or None."""
    for name, module in encoder.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if module is not encoder and any(
            not getattr(h, "__module__", "").startswith(_HARMLESS) for h in hooks
        ):
            return f"{name} has a hook, which would get packed frames"
    implementation = getattr(getattr(encoder, "config", None), "_attn_implementation", "sdpa")
    if implementation not in STANDARD:
        return f"its attention implementation is {implementation}"
    if encoder.training and encoder.dropout_positions > 0.0:
        return "the dropout of positions draws other numbers for each recording"
    if encoder.training and any(
        attention_dropout.forms_weights(layer.self_attn.attention_dropout) for layer in encoder.layers
    ):
        return "the dropout of attention weights is drawn as upstream draws it"
    return obstacle(encoder)


def encoded(encoder, features, lengths):
    """Features (B, T₀, mel_bins), the recordings' frames as a list -> (B, ⌈T₀ / factor⌉, width), 0 behind each end."""
    layers = encoder.subsampling.layers
    packing = Packing(subsampled(layers, lengths), features.device)
    x = Packing(lengths, features.device).by_group(
        lambda x, hidden: encoder.subsampling(x, None if hidden is None else ~hidden),
        [one[:length] for one, length in zip(features, lengths, strict=True)],
        lengths=packing.lengths,
    )
    x = (x * encoder.input_scale).unsqueeze(0)  # [1, N, width]
    positions = encoder.encode_positions(x[:, : max(packing.lengths)])
    x = F.dropout(x, encoder.dropout, encoder.training)
    for layer in encoder.layers:
        if encoder.training and encoder.layerdrop > 0.0 and torch.rand([]) < encoder.layerdrop:
            continue
        x = layer(x, attention_mask=packing, position_embeddings=positions)
    return packing.batch(x[0], subsampled(layers, features.shape[1]))
