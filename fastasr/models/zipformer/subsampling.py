# SPDX-License-Identifier: Apache-2.0
"""The convolutional front end: three convolutions and a ConvNeXt layer. It halves the frame rate.

    h = ConvNeXt(conv(x))                                   x as one channel of (time, frequency)
    y = dropout(BiasNorm(whiten(W rows(h) + b)))            rows: channels and frequencies of a frame

with conv three times SwooshR(Conv2d(x)). Channels are last in memory, in inference and training: the convolutions then
need no reordering.

On a row of fixed length, as ``models.common.row`` describes, one recorded call serves every batch. A recording's output
is the same as if it were alone: in a padded batch the ConvNeXt layer sees 3 frames behind a recording's end that were
computed from padding, and on a row zeros. Recordings begin at even frames. The first frame of the output, at begin / 2,
sees the features begin … begin + 6. A recording of T frames gives max(0, (T − 7) // 2), and its place has ⌈T / 2⌉: at
least 4 are left for the zeros. In training balancers and whitening see the frames that exist behind the
convolution before them, and layerdrop and dropout draw for as many recordings as the row has room for.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastasr._recording import recording
from fastasr._transforms import Function
from fastasr.models.common import plumbing
from fastasr.models.common.convolutions import frames, projected
from fastasr.models.common.linear import Linear
from fastasr.models.common.plain import any_watched, is_plain, is_plain_named, runs
from fastasr.models.common.ragged import REFUSED, current, in_use
from fastasr.models.common.row import MULTIPLE, Capacity, Room, RowCall, RowFrames, Spans, why_beyond
from fastasr.models.zipformer.activations import SwooshR
from fastasr.models.zipformer.balancer import Balancer
from fastasr.models.zipformer.convnext import ConvNeXt, has_plain_parts, runs_by_rows
from fastasr.models.zipformer.decisions import owning
from fastasr.models.zipformer.dropout import Dropout3
from fastasr.models.zipformer.gradient_scale import ScaleGrad
from fastasr.models.zipformer.normalization import BiasNorm
from fastasr.models.zipformer.schedules import FloatLike, ScheduledFloat
from fastasr.models.zipformer.whitening import Whiten
from fastasr.ops import _gemm
from fastasr.packed_frames import PackedFrames

OVER_TIME = [(3, 1, 0), (3, 2, 0), (3, 1, 0)]  # taps, stride and padding of the convolutions
BETWEEN = 4  # frames of nobody between recordings where the ConvNeXt layer sees them

_SHORT = (torch.float16, torch.bfloat16)


class Conv2dSubsampling(torch.nn.Module):
    """x (batch, time, features), x_lens (batch,) of ints -> (batch, (time - 7) // 2, channels), lengths.

    ``forward`` is written for front ends with the submodules conv, convnext, out, out_whiten, out_norm and dropout, and
    calls each of them. conv gets its input in channels_last order, the same values with other strides, unless the call
    is compiled or a module has hooks; on a GPU only 16-bit types are reordered. The result is always contiguous.

    For PackedFrames (N, features) it returns PackedFrames (N // 2, channels) and their lengths, each recording as if it
    were alone, and does not read x_lens.

    Raises ValueError for fewer than 7 in_channels, and for PackedFrames if the front end cannot run on a row;
    AssertionError if the largest length is not the number of output frames, which a compiled call does not check.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        layer1_channels: int = 8,
        layer2_channels: int = 32,
        layer3_channels: int = 128,
        dropout: FloatLike = 0.1,
    ) -> None:
        if in_channels < 7:
            raise ValueError(f"Conv2dSubsampling: in_channels must be at least 7, got {in_channels}")
        super().__init__()
        self.conv = torch.nn.Sequential(
            torch.nn.Conv2d(1, layer1_channels, 3, padding=(0, 1)),
            ScaleGrad(0.2),  # keeps this layer's gradients in the range of float16
            Balancer(layer1_channels, channel_dim=1, max_abs=1.0),
            SwooshR(),
            torch.nn.Conv2d(layer1_channels, layer2_channels, 3, stride=2),
            Balancer(layer2_channels, channel_dim=1, max_abs=4.0),
            SwooshR(),
            torch.nn.Conv2d(layer2_channels, layer3_channels, 3, stride=(1, 2)),
            Balancer(layer3_channels, channel_dim=1, max_abs=4.0),
            SwooshR(),
        )
        self.convnext = ConvNeXt(layer3_channels, kernel_size=(7, 7))
        self.out_width = ((in_channels - 1) // 2 - 1) // 2
        self.layer3_channels = layer3_channels
        self.out = Linear(self.out_width * layer3_channels, out_channels)
        self.out_whiten = Whiten(
            num_groups=1,
            whitening_limit=ScheduledFloat((0.0, 4.0), (20000.0, 8.0), default=4.0),
            prob=(0.025, 0.25),
            grad_scale=0.02,
        )
        self.out_norm = BiasNorm(out_channels)
        self.dropout = Dropout3(dropout, shared_dim=1)

    def forward(self, x: Tensor | PackedFrames, x_lens: Tensor) -> tuple[Any, Tensor]:
        if isinstance(x, PackedFrames):
            return of_packed(self, x)
        h = x.unsqueeze(1)
        with owning():  # no two nodes of a front end get the same gradient
            if _runs_channels_last(self, h):
                # With one channel, contiguous(memory_format=...) would return h itself and conv would stay in NCHW.
                h = _convolved(self.conv, h.to(memory_format=torch.channels_last))
            else:
                h = self.conv(h)
            y = _finished(self, h)
        return y, _lengths(y, (x_lens - 7) // 2)

    def streaming_forward(
        self, x: Tensor, x_lens: Tensor, cached_left_pad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (batch, time, features), one chunk -> (batch, (time - 7) // 2 - 3, channels), lengths, and cached_left_pad
        for the next chunk. The last 3 frames after subsampling serve only as future context.
        """
        x, cached_left_pad = self.convnext.streaming_forward(self.conv(x.unsqueeze(1)), cached_left_pad)
        y = self.out_norm(self.out(frames(x)))
        return y, _lengths(y, (x_lens - 7) // 2 - self.convnext.padding[0]), cached_left_pad

    def get_init_states(self, batch_size: int = 1, device: torch.device = torch.device("cpu")) -> Tensor:  # noqa: B008 (immutable)
        """Returns the first cached_left_pad, (batch_size, layer3_channels, left padding, frequencies)."""
        shape = batch_size, self.layer3_channels, self.convnext.padding[0], self.out_width
        return torch.zeros(shape, dtype=self.out.weight.dtype, device=device)


class _Convolution(Function):
    """A Conv2d of maps whose channels are last, where the gradient of the weight may take another layout."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding = ctx.sizes
        needs = ctx.needs_input_grad[:3]
        return *_gemm.conv2d_grads(grad, x, weight, stride, padding, needs), None, None


def _finished(front_end: Any, x: Tensor) -> Tensor:
    """Returns the output (batch, time, channels) for that of the three convolutions."""
    y = front_end.out_norm(front_end.out_whiten(projected(front_end.out, front_end.convnext(x))))
    return _dropped(front_end, y)


def _convolved(modules: torch.nn.Module, x: Tensor) -> Tensor:
    """Returns ``modules(x)`` of modules without hooks."""
    cast = torch.is_autocast_enabled("cpu") or x.dtype is not torch.float32
    if cast or not x.is_cpu or not torch.is_grad_enabled() or not is_plain(modules, torch.nn.Sequential):
        return modules(x)
    for module in modules:
        if x.requires_grad and plumbing.is_dense_conv2d(module):
            x = _Convolution.apply(x, module.weight, module.bias, module.stride, module.padding)
        else:
            x = module(x)
    return x


def _dropped(front_end: Conv2dSubsampling, y: Tensor) -> Tensor:
    """Runs the dropout; by our code while the call is recorded, which leaves the rate to the host, or on a row."""
    dropout = front_end.dropout
    if (recording() is not None or current() is not None) and is_plain_named(
        dropout, ("Dropout3",), front_end
    ):
        return Dropout3.forward(dropout, y)
    return dropout(y)


def _lengths(y: Tensor, lengths: Tensor) -> Tensor:
    # a replay's host compares the lengths that it has; a compiler would break its graph to read them
    if recording() is not None or torch.compiler.is_compiling():
        return lengths
    longest = lengths.max().item()
    assert y.shape[1] == longest, f"{y.shape[1]} frames, and the longest length is {longest}"
    return lengths


def _runs_channels_last(embed: Conv2dSubsampling, x: Tensor) -> bool:
    weight = next(embed.conv.parameters(), None)  # conv may have been replaced
    if weight is None or not runs_by_rows(x, weight):
        return False
    if any_watched((*embed.conv.modules(), *embed.convnext.modules())):  # these would see the layout
        return False
    cast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return x.is_cpu or cast in _SHORT


# --------------------------------------------------------------------------- on a row
def why_no_row(front_end: Any) -> str | None:
    """Returns why this front end cannot run on a row, or None."""
    conv, convnext = front_end.conv, front_end.convnext
    if not is_plain(conv, torch.nn.Sequential):
        return "conv is not a Sequential, or has hooks"
    for i, part in enumerate(conv):
        of_one_frame = is_plain_named(part, ("ScaleGrad", "SwooshR", "Identity"), front_end)
        if not (plumbing.is_dense_conv2d(part) or of_one_frame or _is_ours(part, Balancer)):
            return f"conv.{i} is not swapped or not upstream's, or has hooks"
    convs = [part for part in conv if plumbing.is_dense_conv2d(part)]
    if [(c.kernel_size[0], c.stride[0], c.padding[0]) for c in convs] != OVER_TIME:
        return "its convolutions see other frames than upstream's"
    if not runs(convnext, ConvNeXt.forward) or not has_plain_parts(convnext):
        return "convnext is not swapped, or has parts that are not upstream's, or hooks"
    if convnext.depthwise_conv.padding[0] > BETWEEN:
        return f"convnext sees more than {BETWEEN} frames on one side"
    for name in ("convnext.hidden_balancer", "convnext.out_balancer", "convnext.out_whiten", "out_whiten"):
        part = front_end.get_submodule(name)
        identity = is_plain_named(part, ("Identity",), front_end)
        if not (identity or _is_ours(part, Balancer) or _is_ours(part, Whiten)):
            return f"{name} is not swapped, or has hooks"
    dropout = front_end.dropout
    if not is_plain_named(dropout, ("Dropout3",), front_end) or dropout.shared_dim != 1:
        return "dropout is not upstream's Dropout3 over time, or has hooks"
    return None


def _is_ours(part: torch.nn.Module, cls: type[torch.nn.Module]) -> bool:
    return runs(part, cls.forward) and is_plain(part, type(part))


def packed(front_end: Any, capacity: Capacity, x: Tensor | PackedFrames, x_lens: Tensor) -> RowCall | str:
    """Returns a call of ``encoded`` for features (B, T, features) and their lengths (B,), or PackedFrames (N,
    features), or the reason why there is none, beside those of ``why_no_row``."""
    lengths = x_lens
    if isinstance(x, PackedFrames):
        x = x.of_features()
        lengths = x.lengths
    elif x.dim() != 3 or x.shape[1] < 9:
        return "its features have another shape, or too few frames for one of output"
    return why_beyond(capacity, x, lengths) or _laid_out(capacity, x, x_lens)


def _laid_out(capacity: Capacity, x: Tensor | PackedFrames, x_lens: Tensor) -> RowCall:
    if isinstance(x, PackedFrames):
        x = x.to(x.frames.device, non_blocking=True)  # the lengths may be on the CPU
        lengths = x.lengths
    else:
        lengths = x_lens.to(x.device, torch.int64, non_blocking=True)
    most, recordings, batch = capacity.frames or 0, capacity.recordings or 0, len(lengths)
    spans = Spans.laid_out(lengths, (lengths + 1) // 2 * 2, recordings)
    rows = -(-max(1, most + recordings) // (2 * MULTIPLE)) * MULTIPLE

    def unpack(y: Tensor) -> tuple[Tensor | PackedFrames, Tensor]:
        begins = spans.begins // 2
        after = Spans(begins, begins + ((spans.ends - spans.begins - 7) // 2).clamp(min=0))
        if isinstance(x, PackedFrames):
            found = after.without_gaps(y, batch, most // 2)
            return found, found.lengths
        return after.unpacked(y, batch, (x.shape[1] - 7) // 2), (x_lens - 7) // 2

    return RowCall((spans.packed(x, 2 * rows + 7), *spans), lengths.sum(), unpack)


def encoded(front_end: Any, x: Tensor, begins: Tensor, ends: Tensor) -> Tensor:
    """Features (1, 2 N + 7, features) of recordings, which lie at [begins, ends), both (R,) -> (1, N, channels)."""
    row = RowFrames(Spans(begins, ends), x.shape[1], x.shape[1], x)
    x = x.unsqueeze(1)
    if _runs_channels_last(front_end, x):
        x = x.to(memory_format=torch.channels_last)
    with owning():
        for module in front_end.conv:
            if isinstance(module, torch.nn.Conv2d):
                row = _behind(row, module, x)
            with in_use(row):
                x = module(x)
        # The ConvNeXt layer must not see frames that upstream would compute from padding.
        x = x.masked_fill(row.hidden[:, None, :, None], 0.0)
        with in_use(row):
            return _finished(front_end, x)


def _behind(row: RowFrames, conv: torch.nn.Conv2d, x: Tensor) -> RowFrames:
    """Returns the frames behind a convolution over the valid ones of each recording."""
    taps, stride = conv.kernel_size[0], conv.stride[0]
    begins, ends = row.spans
    lengths = ((ends - begins - taps) // stride + 1).clamp(min=0)
    begins = begins // stride
    return RowFrames(Spans(begins, begins + lengths), (row.frames - taps) // stride + 1, row.longest, x)


def of_packed(front_end: Any, given: PackedFrames) -> tuple[PackedFrames, Tensor]:
    """Returns the front end's output for PackedFrames (N, features): PackedFrames (N // 2, channels), and their
    lengths, on a row that just fits.

    Raises ValueError if the front end cannot run on a row.
    """
    reason = why_no_row(front_end)
    if reason is not None:
        raise ValueError(REFUSED.format(reason))
    given = given.of_features()
    count = len(given.frames)
    call = _laid_out(Room(count, len(given.lengths), count), given, given.lengths)
    found: tuple[PackedFrames, Tensor] = call.unpack(encoded(front_end, *call.arguments))
    return found
