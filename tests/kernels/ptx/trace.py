# SPDX-License-Identifier: Apache-2.0
"""Counts what an emulated launch does: instructions by place, and how well it uses both memories."""

import numpy as np


def _distinct(places: np.ndarray) -> np.ndarray:
    """Returns how many different numbers each row has; -1 is none."""
    ordered = np.sort(places, 1)
    return (ordered[:, :1] >= 0).sum(1) + ((ordered[:, 1:] != ordered[:, :-1]) & (ordered[:, 1:] >= 0)).sum(1)


class Trace:
    """Counts of a machine's launch, by instruction: ``counts`` of warps that take it; ``sectors`` of 32 bytes of global
    memory, and the ``least_sectors`` that its bytes would fill; ``waves`` of shared memory, each of which serves a word
    of every bank, and the ``least_waves`` without conflicts.
    """

    def __init__(self, machine):
        self.machine = machine
        places = len(machine.steps)
        self.counts = np.zeros(places, np.int64)
        self.sectors, self.least_sectors = np.zeros(places, np.int64), np.zeros(places, np.int64)
        self.waves, self.least_waves = np.zeros(places, np.int64), np.zeros(places, np.int64)

    def step(self, mask: np.ndarray | None) -> None:
        m = self.machine
        warps = m.programs * m.threads // 32 if mask is None else int(m.warps(mask).any(-1).sum())
        self.counts[m.place] += warps

    def access(self, there: bool, addresses: np.ndarray, mask: np.ndarray | None, width: int) -> None:
        """Notes an access of lanes in the last dimension to global memory, if ``there``, or to shared memory."""
        lanes = addresses.shape[-1]
        a = addresses.reshape(-1, lanes).astype(np.int64)
        a = a if mask is None else np.where(mask.reshape(-1, lanes), a, -1)
        place = self.machine.place
        if there:
            self.sectors[place] += _distinct(np.where(a < 0, -1, a // 32)).sum()
            self.least_sectors[place] += -(-_distinct(np.where(a < 0, -1, a // width)) * width // 32).sum()
            return
        words = max(1, width // 4)  # lanes that read 16 bytes take turns, a quarter of a warp each
        if lanes == 32:
            a = a.reshape(-1, lanes // words)
        each = np.where(a[..., None] < 0, -1, a[..., None] // 4 + np.arange(words)).reshape(len(a), -1)
        each.sort(1)
        first = np.concatenate([each[:, :1] >= 0, (each[:, 1:] != each[:, :-1]) & (each[:, 1:] >= 0)], 1)
        rows, columns = np.nonzero(first)
        banks = np.zeros((len(each), 32), np.int64)
        np.add.at(banks, (rows, each[rows, columns] % 32), 1)
        self.waves[place] += banks.max(1).sum()
        self.least_waves[place] += banks.any(1).sum()
