# SPDX-License-Identifier: Apache-2.0
"""Attention among recordings that lie one after the other, with relative positions or without."""

from typing import Any

from torch import Tensor

from fastasr import ops
from fastasr.models.common import attention_dropout
from fastasr.models.common.ragged import Packing
from fastasr.models.common.row import Row
from fastasr.ops import _dispatch


def of_recordings(
    packing: Packing | Row,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    bias_u: Tensor | None,
    bias_v: Tensor | None,
    dropout: float,
    span: tuple[int, int] | None = None,
) -> Tensor:
    """Returns y (N, H, d) of queries, keys and values (N, H, d): each recording sees itself. The positions (2T − 1, H,
    d) are those of T frames, as many as the longest recording has or more, or those of the op's ``pos_span``."""
    whole = (-1, -1) if positions is None else (len(positions) // 2, len(positions) // 2)
    reach = whole[0] if isinstance(packing, Row) else max(packing.lengths) - 1

    def one(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, **recordings: Any) -> Tensor:
        drops: Any = attention_dropout.of_kernel(dropout, q.device)
        given = {"key_padding_mask": hidden, "pos_span": span or whole, **recordings, **drops}
        return ops.rel_attention(q, k, v, positions, bias_u, bias_v, **given)

    if isinstance(packing, Packing) and not _dispatch.served("rel_attention", q):
        # The definition would form the scores of all pairs of rows.
        return packing.by_group(one, q, k, v)
    y = one(q[None], k[None], v[None], None, starts=packing.starts, context=(reach, reach))
    return y.squeeze(0)
