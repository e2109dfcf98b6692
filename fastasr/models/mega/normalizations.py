# SPDX-License-Identifier: Apache-2.0
"""Normalisations over the last dimension, by ESPnet's names."""

import torch
from torch import Tensor


class BasicNorm(torch.nn.Module):
    """x (mean(x^2) + exp(eps))^(-1/2), with ``eps`` learned in the logarithm."""

    def __init__(self, normalized_shape: int, eps: float = 0.25) -> None:
        super().__init__()
        self.eps = torch.nn.Parameter(torch.tensor(eps).log())

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps.exp()).rsqrt()


class RMSNorm(torch.nn.Module):
    """scale x / (rms(x) + eps) (Zhang and Sennrich, 2019), rms over the first ``partial`` of the channels."""

    def __init__(self, normalized_shape: int, eps: float = 1e-5, partial: float = 0.0) -> None:
        super().__init__()
        self.normalized_shape, self.eps, self.p = normalized_shape, eps, partial
        self.partial = 0 < partial < 1
        self.scale = torch.nn.Parameter(torch.ones(normalized_shape))

    def forward(self, x: Tensor) -> Tensor:
        channels = int(self.normalized_shape * self.p) if self.partial else self.normalized_shape
        rms = torch.linalg.vector_norm(x[..., :channels], dim=-1, keepdim=True) * channels**-0.5
        return self.scale * (x / (rms + self.eps))


class ScaleNorm(torch.nn.Module):
    """scale x / max(|x|, eps), one learned scale (Nguyen and Salazar, 2019)."""

    def __init__(self, normalized_shape: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.scale = torch.nn.Parameter(torch.tensor(normalized_shape**0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.scale / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=self.eps))


def get_normalization(
    normalization_type: str, eps: float | None = None, partial: float | None = None
) -> tuple[type[torch.nn.Module], dict[str, float]]:
    """Returns (class, its keyword arguments) as ESPnet's ``get_normalization`` does for these arguments.

    Raises ValueError for an unknown ``normalization_type``.
    """
    table = {
        "basic_norm": (BasicNorm, {"eps": 0.25}),
        "layer_norm": (torch.nn.LayerNorm, {"eps": 1e-12}),
        "rms_norm": (RMSNorm, {"eps": 1e-5, "partial": -1.0}),
        "scale_norm": (ScaleNorm, {"eps": 1e-5}),
    }
    if normalization_type not in table:
        raise ValueError(
            f"MEGA: normalization_type: expected one of {', '.join(table)}, got {normalization_type!r}"
        )
    norm_class, arguments = table[normalization_type]
    if eps is not None:
        arguments["eps"] = eps
    if partial is not None and "partial" in arguments:
        arguments["partial"] = partial
    return norm_class, arguments


def instance(normalization: torch.nn.Module | type[torch.nn.Module], size: int) -> torch.nn.Module:
    """Returns ``normalization`` if it is a module; an instance for ``size`` channels if it is a class."""
    return normalization(size) if isinstance(normalization, type) else normalization
