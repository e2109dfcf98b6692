# SPDX-License-Identifier: Apache-2.0
"""The formats in which streaming engines and searches store weights."""

from collections.abc import Iterable

from torch import Tensor

FORMATS = {"fp32": 0, "bf16": 1, "fp16": 3, "int8": 2}  # cpu::WeightFormat
FP16_MOST = 65504  # the largest number of fp16


def check(caller: str, format: str, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raises ValueError where one of ``weights``, pairs of a name and a tensor, is beyond the format's numbers."""
    if format != "fp16":
        return
    for name, weight in weights:
        beyond = weight[weight.abs() > FP16_MOST]
        if len(beyond):
            raise ValueError(
                f"{caller}: {name} holds {beyond[0]:g}, and the numbers of fp16 end at {FP16_MOST}: "
                "store the weights in fp32, bf16 or int8"
            )
