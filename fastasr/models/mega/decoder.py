# SPDX-License-Identifier: Apache-2.0
"""The MEGA decoder of ESPnet's transducers: embedding, blocks of gated attention and feed-forward, normalisation.

Streaming: the state of a hypothesis is one dict per block, see ``MEGA``. If the decoder starts from ``init_state`` and
gets one label at a time, its outputs equal those of ``forward`` for the whole sequence. ESPnet's outputs differ: it
starts from a key and a value of zero, which attention sees, pads the shorter states of a batch with such zeros, and
keeps the last key and value of a finished chunk. ``phantom_first_step=True`` does the same. ``forward`` treats a label
that equals ``embed_pad`` as padding (unless it comes first); streaming treats it as an ordinary label.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr._recording import on_host
from fastasr.models.common.plain import is_plain
from fastasr.models.common.plumbing import is_idle
from fastasr.models.mega import activations, decoding, normalizations
from fastasr.models.mega.attention import CAUSAL, causal
from fastasr.models.mega.damped_ema import State
from fastasr.models.mega.feed_forward import NormalizedPositionwiseFeedForward
from fastasr.models.mega.gated_attention import MEGA

SCORE_CACHE_SIZE = 128  # hypotheses; an entry holds a state: 0.9 MB for 50 labels at ESPnet's default sizes


class MEGADecoder(torch.nn.Module):
    """labels (B, L) -> (B, L, block_size). It takes ESPnet's arguments and ``phantom_first_step`` (see above).

    Raises ValueError for an unknown type name and for a sequence longer than ``max_positions`` (``rel_pos_bias_type``
    "simple"), TypeError for labels that are not integers.
    """

    mega_blocks: Any  # a ModuleList of pairs: MEGA and NormalizedPositionwiseFeedForward
    final_norm: Any  # of the class that ``normalization_type`` names

    def __init__(
        self,
        vocab_size: int,
        block_size: int = 512,
        linear_size: int = 1024,
        qk_size: int = 128,
        v_size: int = 1024,
        num_heads: int = 4,
        rel_pos_bias_type: str = "simple",
        max_positions: int = 2048,
        truncation_length: int | None = None,
        normalization_type: str = "layer_norm",
        normalization_args: dict[str, Any] | None = None,
        activation_type: str = "swish",
        activation_args: dict[str, Any] | None = None,
        chunk_size: int = -1,
        num_blocks: int = 4,
        dropout_rate: float = 0.0,
        embed_dropout_rate: float = 0.0,
        att_dropout_rate: float = 0.0,
        ema_dropout_rate: float = 0.0,
        ffn_dropout_rate: float = 0.0,
        embed_pad: int = 0,
        phantom_first_step: bool = False,
    ) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(vocab_size, block_size, padding_idx=embed_pad)
        self.dropout_embed = torch.nn.Dropout(p=embed_dropout_rate)
        activation = activations.get_activation(activation_type, **(activation_args or {}))
        norm_class, norm_args = normalizations.get_normalization(
            normalization_type, **(normalization_args or {})
        )

        def block() -> torch.nn.ModuleList:
            return torch.nn.ModuleList(
                [
                    MEGA(
                        block_size,
                        num_heads=num_heads,
                        qk_size=qk_size,
                        v_size=v_size,
                        activation=activation,
                        normalization=norm_class(block_size, **norm_args),
                        rel_pos_bias_type=rel_pos_bias_type,
                        max_positions=max_positions,
                        truncation_length=truncation_length,
                        chunk_size=chunk_size,
                        dropout_rate=dropout_rate,
                        att_dropout_rate=att_dropout_rate,
                        ema_dropout_rate=ema_dropout_rate,
                        phantom_first_step=phantom_first_step,
                    ),
                    NormalizedPositionwiseFeedForward(
                        block_size,
                        linear_size,
                        normalization=norm_class(block_size, **norm_args),
                        activation=activation,
                        dropout_rate=ffn_dropout_rate,
                    ),
                ]
            )

        self.mega_blocks = torch.nn.ModuleList([block() for _ in range(num_blocks)])
        self.final_norm = norm_class(block_size, **norm_args)
        self.vocab_size, self.output_size, self.chunk_size = vocab_size, block_size, chunk_size
        self.mega_num_heads = self.mega_ema_num_heads = num_heads
        self.mega_att_k_size, self.mega_att_v_size = qk_size, v_size
        self.mega_ema_size = block_size
        self.pad_idx, self.num_blocks = embed_pad, num_blocks
        self.phantom_first_step = phantom_first_step
        self.score_cache: dict[tuple[int, ...], Any] = {}
        self._device: torch.device | None = None

    @property
    def device(self) -> torch.device:
        """The device on which states and labels are made: the one given to ``set_device``, or the parameters'."""
        return _parameter(self).device if self._device is None else self._device

    def set_device(self, device: str | torch.device) -> None:
        """Makes states and labels on ``device`` until the parameters move to another device."""
        self._device = torch.device(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MEGADecoder":
        result = super()._apply(fn, recurse)
        self._device = None
        self.score_cache.clear()
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.score_cache.clear()
        super()._load_from_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> "MEGADecoder":
        self.score_cache.clear()
        return super().train(mode)

    def forward(self, labels: Tensor) -> Tensor:
        _check_labels(labels)
        length, chunk = labels.shape[1], self.chunk_size
        if 0 < chunk < length:
            labels = F.pad(labels, (0, -length % chunk), value=self.pad_idx)
            attended = chunk
        else:
            attended = length
        x = _embedded(self, labels, self.dropout_embed)
        mask = _padding(labels, self.pad_idx)
        matrix = None
        for mega, feed_forward in self.mega_blocks:
            attn_mask: Tensor | str = CAUSAL
            if not _takes_causal(mega):
                matrix = causal(attended, attended, x.device) if matrix is None else matrix
                attn_mask = matrix
            x, _ = mega(x, mask=mask, attn_mask=attn_mask)
            x = feed_forward(x)
        return self.final_norm(x).transpose(0, 1)[:, :length]

    def inference(self, labels: Tensor, states: list[State]) -> tuple[Tensor, list[State]]:
        """labels (B, L), states before them (a dict per block) -> (out (B, L, block_size), states after them)."""
        done = decoding.step(self, labels, states)
        if done is not None:
            return done
        _check_labels(labels)
        _check_states(self, states)
        x = _embedded(self, labels)
        after = []
        for (mega, feed_forward), state in zip(self.mega_blocks, states, strict=True):
            attn_mask = CAUSAL if labels.shape[1] > 1 and _takes_causal(mega) else None
            x, state = mega(x, attn_mask=attn_mask, state=state)
            x = feed_forward(x)
            after.append(state)
        return self.final_norm(x).transpose(0, 1), after

    def score(self, label_sequence: list[int], states: list[State]) -> tuple[Tensor, list[State]]:
        """Takes a hypothesis, of which it reads the last label, and the states before that label. Returns
        (out (1, block_size), states after it).

        The last SCORE_CACHE_SIZE results of an utterance are cached by hypothesis and states object. A sequence of a
        single label with states that it did not have before starts a new utterance.
        """
        key, cache = tuple(label_sequence), self.score_cache
        known = cache.pop(key, None)
        if known is None or known[0] is not states:
            if len(key) == 1:
                cache.clear()
            label = torch.full((1, 1), label_sequence[-1], dtype=torch.long, device=_device(self))
            known = (states, *self.inference(label, states))
            while len(cache) >= SCORE_CACHE_SIZE:
                del cache[next(iter(cache))]
        cache[key] = known
        _, out, after = known
        return out[0], after

    def batch_score(self, hyps: Any) -> tuple[Tensor, list[State]]:
        """Decodes the last labels of hypotheses (``yseq``) from the states before them (``dec_state``).

        Returns (out (B, block_size), the states after them: a dict per block for the whole batch).
        """
        labels = torch.tensor([[h.yseq[-1]] for h in hyps], dtype=torch.long, device=_device(self))
        states = self.create_batch_states([h.dec_state for h in hyps])
        out, states = self.inference(labels, states)
        return out.squeeze(1), states

    def init_state(self, batch_size: int = 0) -> list[State]:
        """Returns the states before the first label, for a batch or (``batch_size=0``) for one hypothesis."""
        rows = 1 if self.phantom_first_step else 0
        batch = max(batch_size, 1)
        average = (self.output_size, self.mega_ema_num_heads)
        like: Any = {"dtype": _parameter(self).dtype, "device": self.device}
        return [
            {
                "ema_state": torch.zeros((batch, *average) if batch_size > 0 else average, **like),
                "prev_key": torch.zeros((batch, rows, self.mega_att_k_size), **like),
                "prev_value": torch.zeros((batch, rows, self.mega_att_v_size), **like),
            }
            for _ in range(self.num_blocks)
        ]

    def select_state(self, states: list[State], idx: int) -> list[State]:
        """Returns the states of hypothesis ``idx`` of a batch."""
        selected = []
        for state in states:
            key, value = state["prev_key"][idx], state["prev_value"][idx]
            if "prev_length" in state:
                first = key.shape[0] - int(state["prev_length"][idx])
                key, value = key[first:], value[first:]
            selected.append({"ema_state": state["ema_state"][idx], "prev_key": key, "prev_value": value})
        return selected

    def create_batch_states(self, new_states: list[list[State]]) -> list[State]:
        """Joins the states of hypotheses, [B x [N x dict]], to those of a batch, [N x dict]."""
        batched = []
        for parts in zip(*new_states, strict=True):
            keys = [_unbatched(part["prev_key"], 2) for part in parts]
            state = {
                "ema_state": torch.stack([_unbatched(part["ema_state"], 2) for part in parts]),
                "prev_key": self.stack_qk_states(keys, self.mega_att_k_size),
                "prev_value": self.stack_qk_states(
                    [part["prev_value"] for part in parts], self.mega_att_v_size
                ),
            }
            lengths = [key.shape[0] for key in keys]
            if not self.phantom_first_step and min(lengths) < max(lengths):
                state["prev_length"] = torch.tensor(lengths, dtype=torch.int64, device="cpu")
            batched.append(state)
        return batched

    def stack_qk_states(self, state_list: list[Tensor], dim: int) -> Tensor:
        """Stacks states (H, dim) to (B, largest H, dim), with zeros in front of the shorter ones.

        The result has the states' dtype and device.
        """
        states = [_unbatched(state, 2) for state in state_list]
        lengths = [state.shape[0] for state in states]
        longest = max(lengths)
        stacked = decoding.stack(states)
        if stacked is not None:
            return stacked
        if min(lengths) == longest:
            return torch.stack(states)
        stacked = states[0].new_zeros(len(states), longest, dim)
        for row, state, length in zip(stacked, states, lengths, strict=True):
            row[longest - length :] = state
        return stacked


# These run on instances of ESPnet's class too.
def _parameter(decoder: MEGADecoder) -> Tensor:
    """Returns the embedding's weight, which DataParallel's replicas have, who list no parameters; or any if a user's
    layer in its place has none."""
    return decoder.embed.weight if hasattr(decoder.embed, "weight") else next(decoder.parameters())


def _device(decoder: MEGADecoder) -> torch.device:
    device = _parameter(decoder).device
    # offloaded parameters are elsewhere between calls
    return decoder.device if device.type == "meta" else device


def _takes_causal(mega: MEGA) -> bool:
    """Says whether the block accepts the causal mask by its name. Another forward needs a tensor."""
    return getattr(mega.forward, "takes_causal", False)


def _unbatched(state: Tensor, ndim: int) -> Tensor:
    """Removes the batch dimension of ``init_state`` from a hypothesis's tensor."""
    return state.squeeze(0) if state.ndim > ndim else state


def _embedded(decoder: MEGADecoder, labels: Tensor, dropout: torch.nn.Module | None = None) -> Tensor:
    """Returns the embedded labels (L, B, block_size), contiguous."""
    embed = decoder.embed
    try:
        if not is_plain(embed, torch.nn.Embedding) or not (dropout is None or is_idle(dropout)):
            x = embed(labels)  # upstream draws the dropout mask in the order (B, L, block_size)
            return (x if dropout is None else dropout(x)).transpose(0, 1).contiguous()
        return embed(labels.t())
    except IndexError:
        raise ValueError(
            f"MEGADecoder: labels: expected 0 to {embed.num_embeddings - 1}, "
            f"got {int(labels.min())} to {int(labels.max())}"
        ) from None


def _padding(labels: Tensor, pad: int) -> Tensor | None:
    """Returns (B, 1, L), True where a label is padding; None if no label is, which is only checked on the CPU."""
    mask = labels == pad
    mask[:, :1] = False
    if on_host(mask) and not mask.any():
        return None
    return mask.unsqueeze(1)


def _check_labels(labels: Tensor) -> None:
    if labels.ndim != 2:
        raise ValueError(f"MEGADecoder: labels: expected shape (B, L), got {tuple(labels.shape)}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"MEGADecoder: labels: expected dtype int64 or int32, got {labels.dtype}")


def _check_states(decoder: MEGADecoder, states: list[State]) -> None:
    if len(states) != decoder.num_blocks:
        raise ValueError(
            f"MEGADecoder: states: expected {decoder.num_blocks} dicts, one per block, got {len(states)}"
        )
    for state in states:
        missing = [name for name in ("ema_state", "prev_key", "prev_value") if name not in state]
        if missing:
            raise ValueError(f"MEGADecoder: states: lack {', '.join(missing)}; keys are {', '.join(state)}")
        for name, size in (("prev_key", decoder.mega_att_k_size), ("prev_value", decoder.mega_att_v_size)):
            tensor = state[name]
            if tensor is not None and (tensor.ndim != 3 or tensor.shape[2] != size):
                raise ValueError(
                    f"MEGADecoder: states: {name}: expected shape (B, H, {size}), got {tuple(tensor.shape)}"
                )
