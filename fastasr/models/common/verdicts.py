# SPDX-License-Identifier: Apache-2.0
"""Answers of a device that the host reads later. It waits for an answer's copy, not for the device's other work."""

import torch


class Verdicts:
    """Booleans that are copied from a device. Reading one waits for this copy, not for the stream."""

    def __init__(self, values):
        on_gpu = values.is_cuda
        self.values = torch.empty(values.shape, dtype=torch.bool, device="cpu", pin_memory=on_gpu)
        self.values.copy_(values, non_blocking=True)
        self.copied = torch.cuda.Event() if on_gpu else None
        if on_gpu:
            self.copied.record()

    def read(self, place):
        if self.copied is not None:
            self.copied.synchronize()
        return bool(self.values.view(-1)[place])


class Verdict:
    """One of some ``Verdicts``. A copy or a pickle holds the answer, for which it waits."""

    def __init__(self, verdicts, place=0):
        self.verdicts, self.place = verdicts, place

    @property
    def is_known(self):
        """Says whether reading waits for nothing."""
        return self.verdicts.copied is None

    def read(self):
        return self.verdicts.read(self.place)

    def __deepcopy__(self, memo):
        return Settled(self.read())

    def __reduce__(self):
        return Settled, (self.read(),)


class Settled:
    """A verdict whose value is known."""

    is_known = True

    def __init__(self, value):
        self.value = value

    def read(self):
        return self.value
