# SPDX-License-Identifier: Apache-2.0
"""Answers of a device that the host reads later. It waits for an answer's copy, not for the device's other work."""

from typing import Any

import torch
from torch import Tensor


class Verdicts:
    """Booleans that are copied from a device. Reading one waits for this copy, not for the stream."""

    def __init__(self, values: Tensor) -> None:
        on_gpu = values.is_cuda
        self.values = torch.empty(values.shape, dtype=torch.bool, device="cpu", pin_memory=on_gpu)
        self.values.copy_(values, non_blocking=True)
        self.copied = torch.cuda.Event() if on_gpu else None
        if self.copied is not None:
            self.copied.record()

    def read(self, place: int) -> bool:
        if self.copied is not None:
            self.copied.synchronize()
        return bool(self.values.view(-1)[place])


class Verdict:
    """One of some ``Verdicts``. A copy or a pickle holds the answer, for which it waits."""

    def __init__(self, verdicts: Verdicts, place: int = 0) -> None:
        self.verdicts, self.place = verdicts, place

    @property
    def is_known(self) -> bool:
        """Says whether reading waits for nothing."""
        return self.verdicts.copied is None

    def read(self) -> bool:
        return self.verdicts.read(self.place)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Settled":
        return Settled(self.read())

    def __reduce__(self) -> tuple[type["Settled"], tuple[bool]]:
        return Settled, (self.read(),)


class Settled:
    """A verdict whose value is known."""

    is_known = True

    def __init__(self, value: bool) -> None:
        self.value = value

    def read(self) -> bool:
        return self.value
