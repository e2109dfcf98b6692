# SPDX-License-Identifier: Apache-2.0
"""One layer of the encoder. Its modules follow each other and share one set of attention weights.

    x <- x + f(x) for f = feed_forward1, nonlin_attention, self_attn1, conv_module1, feed_forward2
    x <- bypass_mid(input, x)
    x <- x + f(x) for f = self_attn2, conv_module2, feed_forward3
    x <- bypass(input, norm(x))

The weights come from the layer's input; nonlin_attention uses those of the first head.
"""

import copy
import logging
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastasr import _left
from fastasr._recording import recording
from fastasr._transforms import Function, is_transformed
from fastasr.models.common.inference import is_plain_inference
from fastasr.models.common.plain import any_watched, runs
from fastasr.models.common.ragged import current
from fastasr.models.common.row import RowFrames
from fastasr.models.zipformer import native_layer
from fastasr.models.zipformer.attention import RelPositionMultiheadAttentionWeights
from fastasr.models.zipformer.balancer import Balancer
from fastasr.models.zipformer.bypass import BypassModule
from fastasr.models.zipformer.convolution import ConvolutionModule
from fastasr.models.zipformer.decisions import Numbers, is_zero, owning, rate
from fastasr.models.zipformer.feed_forward import FeedforwardModule
from fastasr.models.zipformer.nonlin_attention import NonlinAttention, is_plain_gate
from fastasr.models.zipformer.normalization import BiasNorm
from fastasr.models.zipformer.packed_weights import constant_weights
from fastasr.models.zipformer.residuals import forked, plus
from fastasr.models.zipformer.schedules import FloatLike, ScheduledFloat, whitening_schedule
from fastasr.models.zipformer.self_attention import SelfAttention, Weights
from fastasr.models.zipformer.shared_weights import FirstHead, SharedWeights
from fastasr.models.zipformer.unmaterialised import UnmaterialisedWeights
from fastasr.models.zipformer.whitening import Whiten
from fastasr.ops import _decided
from fastasr.ops._decided import Drawn

# Larger weights are not materialised in inference, to save memory: for ten minutes of speech they take 14 GB in a layer
# of stack 0. One thread of Zen 4 takes as long either way, within 15 % at 800 frames and 5 % from 1600 on.
MOST_WEIGHT_BYTES = 128 << 20

# With gradients, every layer would keep its weights until the backward pass, which adds up the gradients of three
# consumers. One thread takes as long either way at 10 MB (398 frames of four utterances in stack 0); materialised
# weights take 1.2 to 1.4 times as long at 39 MB and twice as long at 137 MB.
MOST_WEIGHT_BYTES_WITH_GRADIENTS = 16 << 20

CONSTANT_ATTENTION = "this version of icefall may draw constant attention weights in eval mode"


def _skip_rate(*points: tuple[float, float], default: float = 0.0) -> ScheduledFloat:
    """Returns the default of a rate argument, which every layer copies."""
    return ScheduledFloat(*points, default=default)


class ZipformerEncoderLayer(torch.nn.Module):
    """src (time, batch, embed_dim), pos_emb (1 or batch, 2 time - 1, pos_dim) -> src's shape.

    attn_mask ((batch,) time, time) and src_key_padding_mask (batch, time) are True at hidden sources. A chunk_size of 0
    or more is that of a causal layer's convolutions. With left_context_chunks (-1: no limit), attention sees only a
    frame's own chunk and that many chunks before it, as with the corresponding attn_mask.

    The rates are numbers or schedules and act in training. They are the shares of sequences for which the output of
    the attentions, of a convolution, of feed_forward2 or of feed_forward3 is dropped or the whole layer is skipped, and
    the share of calls in which nonlin_attention gets constant weights.
    """

    def __init__(
        self,
        embed_dim: int,
        pos_dim: int,
        num_heads: int,
        query_head_dim: int,
        pos_head_dim: int,
        value_head_dim: int,
        feedforward_dim: int,
        dropout: FloatLike = 0.1,
        cnn_module_kernel: int = 31,
        causal: bool = False,
        attention_skip_rate: FloatLike = _skip_rate((0.0, 0.2), (4000.0, 0.05), (16000, 0.0)),  # noqa: B008 (copied)
        conv_skip_rate: FloatLike = _skip_rate((0.0, 0.2), (4000.0, 0.05), (16000, 0.0)),  # noqa: B008
        const_attention_rate: FloatLike = _skip_rate((0.0, 0.25), (4000.0, 0.025)),  # noqa: B008
        ff2_skip_rate: FloatLike = _skip_rate((0.0, 0.1), (4000.0, 0.01), (50000.0, 0.0)),  # noqa: B008
        ff3_skip_rate: FloatLike = _skip_rate((0.0, 0.1), (4000.0, 0.01), (50000.0, 0.0)),  # noqa: B008
        bypass_skip_rate: FloatLike = _skip_rate((0.0, 0.5), (4000.0, 0.02)),  # noqa: B008
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.bypass = BypassModule(embed_dim, skip_rate=bypass_skip_rate, straight_through_rate=0)
        self.bypass_mid = BypassModule(embed_dim, straight_through_rate=0)
        self.attention_skip_rate = copy.deepcopy(attention_skip_rate)
        self.conv_skip_rate = copy.deepcopy(conv_skip_rate)
        self.ff2_skip_rate = copy.deepcopy(ff2_skip_rate)
        self.ff3_skip_rate = copy.deepcopy(ff3_skip_rate)
        self.const_attention_rate = copy.deepcopy(const_attention_rate)
        self.self_attn_weights = RelPositionMultiheadAttentionWeights(
            embed_dim,
            pos_dim=pos_dim,
            num_heads=num_heads,
            query_head_dim=query_head_dim,
            pos_head_dim=pos_head_dim,
            dropout=0.0,
        )
        self.self_attn1 = SelfAttention(embed_dim, num_heads, value_head_dim)
        self.self_attn2 = SelfAttention(embed_dim, num_heads, value_head_dim)
        self.feed_forward1 = FeedforwardModule(embed_dim, feedforward_dim * 3 // 4, dropout)
        self.feed_forward2 = FeedforwardModule(embed_dim, feedforward_dim, dropout)
        self.feed_forward3 = FeedforwardModule(embed_dim, feedforward_dim * 5 // 4, dropout)
        self.nonlin_attention = NonlinAttention(embed_dim, hidden_channels=3 * embed_dim // 4)
        self.conv_module1 = ConvolutionModule(embed_dim, cnn_module_kernel, causal=causal)
        self.conv_module2 = ConvolutionModule(embed_dim, cnn_module_kernel, causal=causal)
        # Nothing reads this parameter, but upstream's state dict has it.
        self.bypass_scale = torch.nn.Parameter(torch.full((embed_dim,), 0.5))
        self.norm = BiasNorm(embed_dim)
        self.balancer1 = _balancer(embed_dim, 0.45, 0.55, min_abs=0.2, max_abs=4.0)
        self.balancer_na = _balancer(
            embed_dim, 0.3, 0.7, min_abs=ScheduledFloat((0.0, 0.004), (4000.0, 0.02)), prob=0.05
        )
        self.balancer_ff2 = _balancer(
            embed_dim, 0.3, 0.7, min_abs=ScheduledFloat((0.0, 0.0), (4000.0, 0.1)), max_abs=2.0, prob=0.05
        )
        self.balancer_ff3 = _balancer(
            embed_dim, 0.3, 0.7, min_abs=ScheduledFloat((0.0, 0.0), (4000.0, 0.2)), max_abs=4.0, prob=0.05
        )
        self.whiten = Whiten(
            num_groups=1,
            whitening_limit=whitening_schedule(4.0, ratio=3.0),
            prob=(0.025, 0.25),
            grad_scale=0.01,
        )
        self.balancer2 = _balancer(embed_dim, 0.45, 0.55, min_abs=0.1, max_abs=4.0)

    def forward(
        self,
        src: Tensor,
        pos_emb: Tensor,
        chunk_size: int = -1,
        attn_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        left_context_chunks: int | None = None,
    ) -> Tensor:
        return ZipformerEncoderLayer._encode(
            self,
            src,
            pos_emb,
            chunk_size,
            attn_mask,
            src_key_padding_mask,
            self.training,
            left_context_chunks,
        )

    def _encode(
        self,
        src: Tensor,
        pos_emb: Tensor,
        chunk_size: int,
        attn_mask: Tensor | None,
        src_key_padding_mask: Tensor | None,
        may_be_constant: bool,
        left_context_chunks: int | None = None,
    ) -> Tensor:
        """Runs the layer. ``may_be_constant``: whether nonlin_attention may get constant weights on this call."""
        call = src, pos_emb, chunk_size, attn_mask, src_key_padding_mask
        by_submodules = partial(ZipformerEncoderLayer._encode_by_submodules, self, may_be_constant)
        done = None
        if not may_be_constant and not _is_long(self, src):
            done = native_layer.encode(self, *call, left_context_chunks, by_submodules)
        return by_submodules(*call, left_context_chunks) if done is None else done

    def _encode_by_submodules(self, may_be_constant: bool, *call: Any) -> Tensor:
        with owning():  # no two nodes in a layer get the same gradient
            src = ZipformerEncoderLayer._branches(self, may_be_constant, *call)
        with owning(runs(self.whiten, Whiten.forward)):  # Whiten has a copy of its own.
            src = self.balancer2(src)
        return self.whiten(src)

    def _branches(
        self,
        may_be_constant: bool,
        src: Tensor,
        pos_emb: Tensor,
        chunk_size: int,
        attn_mask: Tensor | None,
        src_key_padding_mask: Tensor | None,
        left_context_chunks: int | None,
        time_emb: Tensor | None = None,
    ) -> Tensor:
        attention_skip_rate = rate(self.attention_skip_rate) if self.training else 0.0
        weights: Callable[..., Weights] = self.self_attn_weights
        if _is_long(self, src):
            weights = partial(RelPositionMultiheadAttentionWeights.unmaterialised, self.self_attn_weights)
        window: dict[str, Any] = {}
        if left_context_chunks is not None and chunk_size > 0:
            window = {"chunk_size": chunk_size, "left_context_chunks": left_context_chunks}
        # x is what a branch reads, src the stream
        src, src_mid, src_orig, x, x_ff1 = forked(src, wide=3, narrow=2)
        attn_weights = weights(
            x, pos_emb=pos_emb, attn_mask=attn_mask, key_padding_mask=src_key_padding_mask, **window
        )
        if time_emb is not None:
            src = x_ff1 = src + time_emb
        src, x = plus(src, self.feed_forward1(x_ff1))

        attention_mask = _sequence_mask(self, src, attention_skip_rate)
        attn_weights = _shared(self, attn_weights)
        first_head = attn_weights[0:1]
        first_head = _perhaps_constant(self, first_head) if may_be_constant else first_head
        src, x = plus(src, self.balancer_na(self.nonlin_attention(x, first_head)), attention_mask)
        src, x = plus(src, self.self_attn1(x, attn_weights), attention_mask)
        src, x = _plus_convolved(self, "conv_module1", src, x, chunk_size, src_key_padding_mask, time_emb)
        ff2_skip_rate = rate(self.ff2_skip_rate) if self.training else 0.0
        src, _ = _plus_dropped(self, src, self.balancer_ff2(self.feed_forward2(x)), ff2_skip_rate)
        src, x = forked(self.bypass_mid(src_mid, src), wide=1, narrow=1)

        src, x = plus(src, self.self_attn2(x, attn_weights), attention_mask)
        src, x = _plus_convolved(self, "conv_module2", src, x, chunk_size, src_key_padding_mask, time_emb)
        ff3_skip_rate = rate(self.ff3_skip_rate) if self.training else 0.0
        src, _ = _plus_dropped(self, src, self.balancer_ff3(self.feed_forward3(x)), ff3_skip_rate)
        return self.bypass(src_orig, self.norm(self.balancer1(src)))

    def streaming_forward(
        self,
        src: Tensor,
        pos_emb: Tensor,
        cached_key: Tensor,
        cached_nonlin_attn: Tensor,
        cached_val1: Tensor,
        cached_val2: Tensor,
        cached_conv1: Tensor,
        cached_conv2: Tensor,
        left_context_len: int,
        src_key_padding_mask: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """src (time, batch, embed_dim), one chunk, pos_emb (1 or batch, left_context_len + 2 time - 1, pos_dim),
        src_key_padding_mask (batch, left_context_len + time) and six caches -> output of src's shape and the six caches
        for the next chunk, in the order of the arguments.
        """
        states = cached_key, cached_nonlin_attn, cached_val1, cached_val2, cached_conv1, cached_conv2
        chunk = src, pos_emb, states, left_context_len, src_key_padding_mask
        by_submodules = partial(_stream_by_submodules, self)
        done = native_layer.step(self, *chunk, by_submodules)
        return by_submodules(*chunk) if done is None else tuple(done)


def _stream_by_submodules(
    layer: ZipformerEncoderLayer,
    src: Tensor,
    pos_emb: Tensor,
    states: tuple[Tensor, ...] | list[Tensor],
    left_context_len: int,
    src_key_padding_mask: Tensor | None,
) -> tuple[Tensor, ...]:
    src_orig = src
    cached_key, cached_nonlin_attn, cached_val1, cached_val2, cached_conv1, cached_conv2 = states
    attn_weights, cached_key = layer.self_attn_weights.streaming_forward(
        src,
        pos_emb=pos_emb,
        cached_key=cached_key,
        left_context_len=left_context_len,
        key_padding_mask=src_key_padding_mask,
    )
    chunk_mask = None if src_key_padding_mask is None else src_key_padding_mask[:, left_context_len:]
    src = src + layer.feed_forward1(src)

    y, cached_nonlin_attn = layer.nonlin_attention.streaming_forward(
        src, attn_weights[0:1], cached_x=cached_nonlin_attn, left_context_len=left_context_len
    )
    src = src + y
    y, cached_val1 = layer.self_attn1.streaming_forward(
        src, attn_weights=attn_weights, cached_val=cached_val1, left_context_len=left_context_len
    )
    src = src + y
    y, cached_conv1 = layer.conv_module1.streaming_forward(
        src, cache=cached_conv1, src_key_padding_mask=chunk_mask
    )
    src = src + y
    src = src + layer.feed_forward2(src)
    src = layer.bypass_mid(src_orig, src)

    y, cached_val2 = layer.self_attn2.streaming_forward(
        src, attn_weights=attn_weights, cached_val=cached_val2, left_context_len=left_context_len
    )
    src = src + y
    y, cached_conv2 = layer.conv_module2.streaming_forward(
        src, cache=cached_conv2, src_key_padding_mask=chunk_mask
    )
    src = src + y
    src = src + layer.feed_forward3(src)
    src = layer.bypass(src_orig, layer.norm(src))
    return src, cached_key, cached_nonlin_attn, cached_val1, cached_val2, cached_conv1, cached_conv2


def takes_chunks(layer: ZipformerEncoderLayer) -> bool:
    """Says whether ``layer`` and its attention run our code, so that they accept left_context_chunks instead of a
    mask.
    """
    attention = getattr(layer, "self_attn_weights", None)
    if (
        type(layer) is not ZipformerEncoderLayer
        or type(attention) is not RelPositionMultiheadAttentionWeights
    ):
        return False
    changed = any("forward" in vars(module) for module in (layer, attention))
    return not changed and not any_watched((layer, attention))


def _is_long(layer: ZipformerEncoderLayer, src: Tensor) -> bool:
    """Says whether the consumers should compute the weights of this call, since they are too large to keep. The layer's
    attention modules must all run our code, their own or bound to them.
    """
    packing = current()
    if isinstance(packing, RowFrames):
        return True
    if torch.compiler.is_compiling() or is_transformed() or recording() is not None or src.ndim != 3:
        return False
    attention = layer.self_attn_weights
    if not runs(attention, RelPositionMultiheadAttentionWeights.forward):
        return False
    frames, batch, _ = src.shape
    groups = [(batch, frames)] if packing is None else [(len(g.members), g.longest) for g in packing.groups]
    weights = sum(count * longest * longest for count, longest in groups)
    size = attention.num_heads * weights * src.element_size()
    if size <= min(MOST_WEIGHT_BYTES, MOST_WEIGHT_BYTES_WITH_GRADIENTS):
        return False
    if not _consumers_are_ours(layer) or any_watched((attention, *_consumers(layer))):
        return False
    if is_plain_inference(layer, src, attention.in_proj.weight, 3):
        return size > MOST_WEIGHT_BYTES
    return (
        size > MOST_WEIGHT_BYTES_WITH_GRADIENTS
        and src.device.type == "cpu"
        and torch.is_grad_enabled()
        and (src.requires_grad or attention.in_proj.weight.requires_grad)
        and attention.dropout == 0.0
    )


def _perhaps_constant(layer: ZipformerEncoderLayer, weights: Weights) -> Weights:
    """Returns the first head's weights, or constant ones on a share of the calls."""
    recorded = recording()
    if recorded is None:
        return constant_weights(weights) if random.random() < float(layer.const_attention_rate) else weights
    numbers = recorded.numbers(lambda: [random.random() < float(layer.const_attention_rate)], 1)
    if isinstance(weights, UnmaterialisedWeights):
        return weights.constant(numbers.values[:1])
    if isinstance(weights, FirstHead):
        return FirstHead(weights.shared, numbers)
    return _Constant.apply(weights, numbers)


def _shared(layer: ZipformerEncoderLayer, weights: Weights) -> Weights:
    """Returns the weights, while a call is recorded as weights whose consumers share the memory of their gradient."""
    recorded = recording() is not None and isinstance(weights, Tensor) and weights.requires_grad
    if not recorded or not _consumers_are_ours(layer) or not is_plain_gate(layer.nonlin_attention):
        return weights
    attention = layer.self_attn_weights
    padded = runs(attention, RelPositionMultiheadAttentionWeights.forward) and attention.dropout == 0.0
    return SharedWeights(weights, padded)


def _consumers(layer: ZipformerEncoderLayer) -> tuple[torch.nn.Module, ...]:
    return layer.nonlin_attention, layer.self_attn1, layer.self_attn2


def _consumers_are_ours(layer: ZipformerEncoderLayer) -> bool:
    gate, *attentions = _consumers(layer)
    return runs(gate, NonlinAttention.forward) and all(runs(m, SelfAttention.forward) for m in attentions)


class _Constant(Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, numbers: Numbers) -> Tensor:
        ctx.numbers = numbers
        return _decided.either(weights, numbers.values[:1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * (ctx.numbers.values[0] == 0).to(grad.dtype), None


def _balancer(channels: int, min_positive: float, max_positive: float, **limits: Any) -> Balancer:
    return Balancer(channels, channel_dim=-1, min_positive=min_positive, max_positive=max_positive, **limits)


def _plus_convolved(
    layer: ZipformerEncoderLayer,
    name: str,
    src: Tensor,
    x: Tensor,
    chunk_size: int,
    src_key_padding_mask: Tensor | None,
    time_emb: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if not getattr(layer, "use_conv", True):
        return src, x
    skip_rate = rate(layer.conv_skip_rate) if layer.training else 0.0
    if time_emb is not None:
        src = x = src + time_emb
    options = {"chunk_size": chunk_size} if chunk_size >= 0 else {}  # ZipVoice's module takes none
    y = getattr(layer, name)(x, src_key_padding_mask=src_key_padding_mask, **options)
    return _plus_dropped(layer, src, y, skip_rate)


def _sequence_mask(layer: ZipformerEncoderLayer, x: Tensor, rate: Tensor | float) -> Drawn | Tensor | None:
    """Draws (batch, 1), 0 for dropped sequences and 1 for the others, from torch's generator; None at rate 0. For
    packed frames it returns (frames, 1, 1), while a call is recorded the numbers, the rate and whose frames there
    are."""
    if is_zero(rate) or not layer.training:
        return None
    packing = current()
    numbers = torch.rand(x.shape[1] if packing is None else packing.count, 1, device=x.device)
    if isinstance(rate, Tensor):
        return Drawn(numbers, rate, packing.recording if isinstance(packing, RowFrames) else None)
    mask = (numbers > rate).to(x.dtype)
    return mask if packing is None else packing.repeated(mask).unsqueeze(1)


def _plus_dropped(
    layer: ZipformerEncoderLayer, src: Tensor, y: Tensor, rate: Tensor | float
) -> tuple[Tensor, Tensor]:
    return plus(src, y, _sequence_mask(layer, y, rate))


def constant_attention_in_eval(
    layer: ZipformerEncoderLayer,
    src: Tensor,
    pos_emb: Tensor,
    chunk_size: int = -1,
    attn_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Computes ``ZipformerEncoderLayer.forward`` as in icefall before March 2024: ``const_attention_rate``, whose
    published schedule is 0 in eval mode, acts in eval mode only. Its random number is drawn in eval mode only too.
    """
    if src.is_cpu and not layer.training:  # A native call would serve otherwise.
        _left.note(layer, CONSTANT_ATTENTION, level=logging.INFO)
    return ZipformerEncoderLayer._encode(
        layer, src, pos_emb, chunk_size, attn_mask, src_key_padding_mask, not layer.training
    )


def timed_forward(
    layer: Any,
    src: Tensor,
    pos_emb: Tensor,
    time_emb: Tensor | None = None,
    attn_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Computes ZipVoice's layer, which has convolutions if ``use_conv`` says so, and adds ``time_emb``, (batch,
    embed_dim) or (time, batch, embed_dim), to the stream before feed_forward1 and before each convolution. The weights
    come from the input without it."""
    call = src, pos_emb, -1, attn_mask, src_key_padding_mask
    if time_emb is None and layer.use_conv:
        return ZipformerEncoderLayer._encode(layer, *call, layer.training)
    src = ZipformerEncoderLayer._branches(layer, layer.training, *call, None, time_emb)
    return layer.whiten(layer.balancer2(src))
