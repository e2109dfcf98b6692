# SPDX-License-Identifier: Apache-2.0
"""The Emformer (Shi et al., 2021): a streaming acoustic encoder, as ``torchaudio.models.Emformer``.

Every segment of an utterance attends to itself, a few frames before and after it and a memory of means of earlier
segments. Parameters, constructor, ``forward``, ``infer`` and its states are torchaudio's. Attention runs in
:func:`fastasr.ops.segment_attention`, so no mask is built, and ``infer`` reads nothing back from the device.

It differs from torchaudio in two points: ``infer`` works in half precision, and a query that sees only padding gets 0.
"""

from fastasr.models.emformer.encoder import Emformer
from fastasr.models.emformer.layer import EmformerAttention, EmformerLayer

__all__ = ["Emformer", "EmformerAttention", "EmformerLayer"]
