# SPDX-License-Identifier: Apache-2.0
"""The tensors that a launch reaches through a table of jobs, which holds their addresses."""

from collections.abc import Iterable

import torch

written = {}  # address -> the last tensor there that was written to a table


def row(fields: Iterable, make) -> object:
    """Makes a row of a table by ``make(fields)`` and notes its tensors."""
    fields = list(fields)
    written.update({t.data_ptr(): t for t in fields if isinstance(t, torch.Tensor)})
    return make(fields)


def tensors(table: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the tensors of a table by their places."""
    addresses = enumerate(table.flatten().tolist())
    return {f"JOBS[{i}]": written[a] for i, a in addresses if a in written}
