# SPDX-License-Identifier: Apache-2.0
"""The feed-forward module: a linear layer, SwooshL, dropout, a linear layer."""

import torch
from torch import Tensor

from fastasr.models.common.linear import Linear
from fastasr.models.zipformer.activations import ActivationDropoutAndLinear
from fastasr.models.zipformer.balancer import Balancer
from fastasr.models.zipformer.schedules import FloatLike, whitening_schedule
from fastasr.models.zipformer.whitening import Whiten


class FeedforwardModule(torch.nn.Module):
    """x (time, batch, embed_dim) -> same shape. All frames of a sequence share one dropout mask."""

    def __init__(self, embed_dim: int, feedforward_dim: int, dropout: FloatLike) -> None:
        super().__init__()
        self.in_proj = Linear(embed_dim, feedforward_dim)
        self.hidden_balancer = Balancer(
            feedforward_dim, channel_dim=-1, min_positive=0.3, max_positive=1.0, min_abs=0.75, max_abs=5.0
        )
        self.out_proj = ActivationDropoutAndLinear(
            feedforward_dim,
            embed_dim,
            activation="SwooshL",
            dropout_p=dropout,
            dropout_shared_dim=0,
            initial_scale=0.1,
        )
        self.out_whiten = Whiten(
            num_groups=1, whitening_limit=whitening_schedule(7.5), prob=(0.025, 0.25), grad_scale=0.01
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.out_whiten(self.out_proj(self.hidden_balancer(self.in_proj(x))))
