# SPDX-License-Identifier: Apache-2.0
"""The learnable bypass around a module, with random skipping of whole sequences in training.

y = x_orig + (x - x_orig) * scale
"""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastasr import ops
from fastasr._recording import recording
from fastasr._transforms import Function
from fastasr.models.common.ragged import current
from fastasr.models.common.row import RowFrames
from fastasr.models.zipformer.decisions import is_zero, rate
from fastasr.models.zipformer.parameter_limits import limit_param_value, recorded_limit, recorded_limits
from fastasr.models.zipformer.schedules import FloatLike, ScheduledFloat
from fastasr.ops._decided import Drawn
from fastasr.ops.bypass import dropped, dropped_gradients


class BypassModule(torch.nn.Module):
    """src_orig, src (time, batch, embed_dim) -> same shape.

    scale is ``bypass_scale`` (embed_dim,). In training it is (batch, embed_dim), and a row becomes 0 with probability
    ``skip_rate`` (the module is skipped) and at least 1 with probability ``straight_through_rate``. Rates and limits
    are numbers or schedules that convert to float.
    """

    def __init__(
        self,
        embed_dim: int,
        skip_rate: FloatLike = 0.0,
        straight_through_rate: FloatLike = 0.0,
        scale_min: FloatLike = ScheduledFloat((0.0, 0.9), (20000.0, 0.2), default=0),  # noqa: B008 (copied)
        scale_max: FloatLike = 1.0,
    ) -> None:
        super().__init__()
        self.bypass_scale = torch.nn.Parameter(torch.full((embed_dim,), 0.5))
        self.skip_rate = copy.deepcopy(skip_rate)
        self.straight_through_rate = copy.deepcopy(straight_through_rate)
        self.scale_min = copy.deepcopy(scale_min)
        self.scale_max = copy.deepcopy(scale_max)

    def _get_bypass_scale(self, batch_size: int) -> Tensor:
        scale: Tensor = self.bypass_scale
        if not self.training:
            return scale
        recorded = recording() is not None
        if recorded:
            limits = recorded_limits(self.scale_min, self.scale_max)
        else:
            scale = limit_param_value(scale, min=self.scale_min, max=self.scale_max)
        skip_rate: Any = rate(self.skip_rate)
        drawn = None
        if not is_zero(skip_rate):
            drawn = torch.rand(batch_size, 1, device=scale.device)
            scale = scale if recorded else scale * (drawn > skip_rate)
        if recorded:
            scale = recorded_limit(scale, limits, None if drawn is None else Drawn(drawn, skip_rate))
        straight_through_rate = rate(self.straight_through_rate)
        if not is_zero(straight_through_rate):
            straight = torch.rand(batch_size, 1, device=scale.device) < straight_through_rate
            scale = torch.maximum(scale, straight.to(scale.dtype))
        return scale

    def forward(self, src_orig: Tensor, src: Tensor) -> Tensor:
        packing = current()
        if isinstance(packing, RowFrames):
            return _on_row(self, packing, src_orig, src)
        batch = src.shape[1] if packing is None else packing.count
        if recording() is None:
            scale = self._get_bypass_scale(batch)
        else:  # Upstream's method would decide once for all replays.
            scale = BypassModule._get_bypass_scale(self, batch)
        if packing is None or scale.dim() == 1:
            return ops.bypass(src_orig, src, scale)
        # scale is small beside the layer: repeating it takes no measurable time
        return ops.bypass(src_orig.squeeze(1), src.squeeze(1), packing.repeated(scale)).unsqueeze(1)


class _Dropped(Function):
    @staticmethod
    def forward(ctx: Any, src_orig: Tensor, src: Tensor, scale: Tensor, *drawn: Tensor) -> Tensor:
        ctx.save_for_backward(src_orig, src, scale, *drawn)
        return dropped(src_orig, src, scale, Drawn(*drawn))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        src_orig, src, scale, *drawn = ctx.saved_tensors
        return *dropped_gradients(grad, src_orig, src, scale, Drawn(*drawn)), None, None, None


def _on_row(self: Any, row: RowFrames, src_orig: Tensor, src: Tensor) -> Tensor:
    """Does as ``forward`` with one scale for all frames: where a recording skips the module, src_orig takes the place
    of src. No sequence goes straight through."""
    scale: Tensor = self.bypass_scale
    if self.training:
        scale = limit_param_value(scale, min=self.scale_min, max=self.scale_max)
        skip_rate = rate(self.skip_rate)
        if not is_zero(skip_rate):
            drawn = torch.rand(row.count, 1, device=scale.device)
            if isinstance(skip_rate, Tensor):
                return _Dropped.apply(src_orig, src, scale, drawn, skip_rate, row.recording)
            src = torch.where(row.repeated(drawn > skip_rate).unsqueeze(1), src, src_orig)
    return ops.bypass(src_orig, src, scale)
