# SPDX-License-Identifier: Apache-2.0
"""The keys that an attention mask of transformers or NeMo hides, read once for all layers that get the same mask."""

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastasr._recording import has_values, is_traced, recording
from fastasr._transforms import is_transformed
from fastasr.models.common.ragged import are_all_padded, on_gpu
from fastasr.ops import _kept
from fastasr.ops._relative_positions import outside_context

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


WANTED = "attention weights are asked for"
WATCHED = "the attention has hooks, which may read its weights"
OTHER = "an input, a mask or positions that rel_attention does not take"
OTHER_KEYS = "the call has frames before its own, or keys of another sequence"


class Seen(NamedTuple):
    """The keys that queries see.

    ``hidden_keys`` (B, T): True at keys that no query sees. ``empty_rows`` (B, T): True at queries that see no key, or
    None if there are none; a GPU does not look whether a mask (B, T) has some. ``by_length``: whether every other query
    sees every other key. ``context``: the arguments of ``ops.rel_attention`` that with ``hidden_keys`` say all that the
    mask does, or {}.
    """

    hidden_keys: Tensor
    empty_rows: Tensor | None
    by_length: bool
    context: dict


def is_readable(mask: Tensor | None, batch: int, frames: int, keys: int | None = None) -> bool:
    """Says whether ``mask`` is None or bool (B, 1, T, K), True where a query (third) sees a key (last), with K = T
    unless given; or bool (B, T), True at valid frames, each of which sees all others: over an hour the pairs would take
    2 GB.
    """
    shapes = ((batch, 1, frames, frames), (batch, frames)) if keys is None else ((batch, 1, frames, keys),)
    return mask is None or (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape in shapes)


def read(mask: "Tensor | BlockMask | None", implementation: str, batch: int, frames: int) -> Tensor | None:
    """Returns a mask that transformers made for an implementation of attention as ``seen`` reads it, bool (B or 1, 1,
    T, T), or None if there is none or it does more than hide keys.

    For "sdpa" it is such a tensor, for "eager" 0 and the lowest number, which is added to the scores, and for
    "flex_attention" a BlockMask, a function of the indices. Another dtype is added to the scores as well.
    """
    if mask is None or tuple(mask.shape) not in ((1, 1, frames, frames), (batch, 1, frames, frames)):
        return None
    evaluate: Callable[[Any], Tensor | None] | None = None
    if not isinstance(mask, Tensor):
        evaluate = _evaluated if implementation == "flex_attention" else None
    elif implementation == "sdpa" and mask.dtype == torch.bool:
        return mask
    elif implementation == "eager" and mask.is_floating_point() and has_values(mask):
        evaluate = _added
    if evaluate is None or is_traced() or is_transformed() or recording() is not None:
        return None
    version = None
    if isinstance(mask, Tensor):  # On a CPU, reading it anew is a small part of eager's work.
        version = object() if mask.is_cpu else _kept.content(mask)
    return _kept.on(mask, "_fastasr_pairs", version, partial(evaluate, mask))


def _added(mask: Tensor) -> Tensor | None:
    sees = mask == 0
    return sees if bool((sees | (mask == torch.finfo(mask.dtype).min)).all()) else None


def _evaluated(mask: "BlockMask") -> Tensor:
    of_sequence = torch.arange(mask.shape[0], device=mask.kv_num_blocks.device, dtype=torch.int64)
    query = torch.arange(mask.shape[-1], device=of_sequence.device, dtype=torch.int64)
    sees = mask.mask_mod(of_sequence[:, None, None], query.new_zeros(()), query[:, None], query)
    return sees.expand(len(of_sequence), len(query), len(query)).unsqueeze(1)


# The functions from which NeMo's TransformerEncoder makes a BlockMask, and the contexts that they add to the lengths
_OF_NEMO = {
    ("_make_padding_mod.<locals>.pad_mask",): {},
    ("_make_causal_mod.<locals>.causal", "_make_padding_mod.<locals>.pad_mask"): {"context": (-1, 0)},
}


def of_nemo(mask: "BlockMask | None", batch: int, frames: int, cls: type) -> dict[str, Any] | None:
    """Returns the arguments of ``ops.rel_attention`` for a BlockMask that the module of the class ``cls`` made, or None
    if it is of another origin. The last query sees all that any does."""
    if mask is None:
        return {}
    function = getattr(mask, "mask_mod", None)
    if function is None or tuple(mask.shape) != (batch, 1, frames, frames):
        return None
    parts = (function,)
    if function.__qualname__ == "and_masks.<locals>.and_mask":
        if torch.compiler.is_dynamo_compiling():  # The closure cannot be read, so the mask is formed.
            return {"attn_mask": ~_evaluated(mask)[:, 0]}
        parts = function.__closure__[0].cell_contents
    context = _OF_NEMO.get(tuple(part.__qualname__ for part in parts))
    if context is None or {part.__module__ for part in parts} != {cls.__module__}:
        return None
    if is_traced():
        return {"key_padding_mask": _hidden_keys(mask, batch, frames), **context}
    hidden = _kept.on(mask, "_fastasr_hidden", None, lambda: _hidden_keys(mask, batch, frames))
    return {"key_padding_mask": hidden, **context}


def _hidden_keys(mask: "BlockMask", batch: int, frames: int) -> Tensor:
    of_sequence = torch.arange(batch, device=mask.kv_num_blocks.device, dtype=torch.int64)
    key = torch.arange(frames, device=of_sequence.device, dtype=torch.int64)
    return ~mask.mask_mod(of_sequence[:, None], key.new_zeros(()), key[-1:], key)


def implementation(config: Any) -> str | None:
    """Returns the name of the attention implementation of a model of transformers, behind that of a function which a
    user has registered under the name; "sdpa" of a model of ours, without a config."""
    name = getattr(config, "_attn_implementation", "sdpa")
    home = None if config is None else sys.modules.get("transformers.modeling_utils")
    found = None if home is None else home.ALL_ATTENTION_FUNCTIONS.get(name)
    if found is None or found.__module__.startswith("transformers."):
        return name
    return f"{found.__module__}.{found.__qualname__}, registered as {name}"


def unread(known: bool, implementation: str | None) -> str:
    """Returns why upstream's code serves a call: its implementation is not ``known``, or its mask is not readable."""
    return OTHER if known else f"the attention implementation is {implementation}"


def pairs(mask: Tensor) -> Tensor:
    """Returns bool (B, 1, T, T) for a mask of either shape."""
    return mask[:, None, :, None] & mask[:, None, None, :] if mask.dim() == 2 else mask


def seen(
    mask: Tensor, hides: bool = False, left: int | None = None, window: tuple[int, int] | None = None
) -> Seen:
    """Returns the Seen of ``mask``, bool (B, 1, T, K), True where a query sees a key, or bool (B, T), True at valid
    frames. With ``hides`` the mask is NeMo's: (B, T, T), True where a key is hidden. ``left``: it may stand for chunks
    and as many earlier ones as fit into ``left`` frames. ``window``: it may stand for this context of every query.

    The answer stays with the tensor: a mask of a long recording is large, and an encoder gives it to every layer. On
    the CPU it holds for this content of the mask; on a GPU writes that torch does not count pass unnoticed. A recorded
    call, whose masks change from replay to replay, computes it in each.
    """
    if is_transformed() or not has_values(mask):
        return _seen_by_any_values(mask, hides)
    recorded = recording()
    if recorded is not None:
        version = recorded, None if mask.is_inference() else mask._version
        return _kept.on(mask, "_fastasr_seen", version, lambda: _seen_by_any_values(mask, hides))
    return _kept.on(mask, "_fastasr_seen", _kept.content(mask), lambda: _seen_now(mask, hides, left, window))


def _seen_by_any_values(mask: Tensor, hides: bool) -> Seen:
    """Returns what holds whatever the mask's values are."""
    if mask.dim() == 2:
        hidden = ~mask
        return Seen(hidden, hidden, True, {})
    by_query = ~mask if hides else mask[:, 0]
    return Seen(~by_query.any(1), ~by_query.any(2), False, {})


def _seen_now(mask: Tensor, hides: bool, left: int | None, window: tuple[int, int] | None) -> Seen:
    """Returns what holds for the mask's values."""
    if mask.dim() == 2:
        rows, keys, by_length = mask, mask, True
    else:
        by_query = ~mask if hides else mask[:, 0]
        rows, keys = by_query.any(2), by_query.any(1)
        # The mask holds all pairs of seeing queries and seen keys exactly if it holds as many as there are. A sum would
        # first copy the mask as 64-bit integers.
        counts = torch.stack([torch.count_nonzero(m) for m in by_query]) if len(mask) else rows.sum(1)
        by_length = torch.equal(counts, rows.sum(1) * keys.sum(1))
    empty = ~rows
    context = {} if by_length else _context(by_query, keys, left, window)
    # This waits for the answer of a GPU.
    are_some = (mask.dim() == 2 and on_gpu(mask.device)) or bool(empty.any())
    return Seen(~keys, empty if are_some else None, by_length, context)


def _context(
    by_query: Tensor, seen_keys: Tensor, left: int | None, window: tuple[int, int] | None
) -> dict[str, Any]:
    """Returns the context that with hidden keys makes the mask (B, T, T), or {}: the given window, or chunks, the first
    of which the first query sees."""
    frames, keys = by_query.shape[1:]
    chunk = 0 if left is None else int(by_query[:, 0].any(0).sum())
    context: dict[str, Any] = {} if window is None else {"context": window, "chunk_size": 1}
    if chunk and left is not None:
        context = {"context": (left // chunk * chunk, 0), "chunk_size": chunk}
    if frames != keys or not context:
        return {}
    expected = seen_keys[:, None] & ~outside_context(by_query, **context)
    return context if torch.equal(by_query, expected) else {}


def are_empty_rows_read(by: Seen, device: torch.device) -> bool:
    """Says whether queries that see no key need upstream's values. With a mask of lengths these are padding, which no
    other frame depends on: later layers hide its keys, and the convolutions set its frames to 0. A GPU leaves the
    values out, because they would take the host a tenth of a call. The CPU and ``verify`` compute them.
    """
    return not (by.by_length and on_gpu(device)) or are_all_padded()


def of_kernel(mask: Tensor | None, by: Seen | None, hides: bool = False) -> dict[str, Any]:
    """Returns the arguments of ``ops.rel_attention`` for ``mask`` and its Seen; {} without a mask."""
    if by is None or mask is None:
        return {}
    if by.by_length or by.context:
        return {"key_padding_mask": by.hidden_keys, **by.context}
    return {"attn_mask": mask if hides else ~mask[:, 0]}
