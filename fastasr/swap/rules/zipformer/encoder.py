# SPDX-License-Identifier: Apache-2.0
"""Rules for the encoder as a whole, which only ``accelerate(ragged=True)`` binds: it then runs without padding."""

from dataclasses import replace

from fastasr.models.zipformer import ragged
from fastasr.swap.rule import Ragged, Rule, check_parameters, own_forward, unread_code, upstream_class
from fastasr.swap.rules.zipformer.versions import ICEFALL, PACKAGE

# the zipformer package's, and icefall's since pull request 2086
_STACKS = {"4594189750189293c0d27870", "b4aaf999a1d0f4d4403208bd"}
_DOWNSAMPLED = {"a0afcb21135230d9ecb5c6be", "a73ace9dd5add7a70b8d8807"}
_RESAMPLING = {"0b4a0963cf96f851ba535291", "d5b544a9315e184c6a5a2571", "dbf685249a5b00d49d4fd33d"}


def encoder(self, x, x_lens, src_key_padding_mask=None):
    """Runs on the frames that exist, or as upstream where there is no padding or it must stay."""
    lengths = ragged.lengths(self, x, src_key_padding_mask)
    if lengths is None:
        return upstream_class(self).forward(self, x, x_lens, src_key_padding_mask)
    return ragged.encoded(self, x, lengths), (x_lens + 1) // 2


def _obstacle(module):
    """Our forward does what stacks and resampling do, so these must run upstream's code."""
    reason = unread_code("downsample_output", module.downsample_output, own_forward, _RESAMPLING)
    for i, stack in enumerate(module.encoders):
        name = f"encoders.{i}"
        if hasattr(stack, "downsample"):
            reason = reason or unread_code(name, stack, own_forward, _DOWNSAMPLED)
            for part in ("downsample", "upsample"):
                reason = reason or unread_code(
                    f"{name}.{part}", getattr(stack, part), own_forward, _RESAMPLING
                )
            name, stack = f"{name}.encoder", stack.encoder
        reason = reason or unread_code(name, stack, own_forward, _STACKS)
    return reason or ragged.obstacle(module)


ENCODER = Rule(
    name="zipformer.encoder",
    class_name="Zipformer",
    forward=encoder,
    structure=lambda module: check_parameters(module, {}),
    known={"a8293a774b5bf0cea0a06a0a": PACKAGE},
    shallow=True,
    companion=True,
    ragged=Ragged(encoder, _obstacle),
    note="bound by ragged=True alone",
)

ZIPFORMER2 = replace(ENCODER, class_name="Zipformer2", known={"deb746dcdc8224bdd3daba1c": ICEFALL})
