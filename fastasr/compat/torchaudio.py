# SPDX-License-Identifier: Apache-2.0
"""torchaudio's RNN-T loss, for a torch that no torchaudio fits or to compute it with fastasr's kernels.

    import fastasr.compat.torchaudio
    fastasr.compat.torchaudio.install()

From then on ``torchaudio.functional.rnnt_loss`` and ``torchaudio.transforms.RNNTLoss`` are those of this module. Where
torchaudio is missing or cannot be loaded, modules that hold nothing else stand in for it.
"""

import importlib
import sys
from types import ModuleType

from torch import Tensor, nn

from fastasr.rnnt import lengths, losses

__all__ = ["RNNTLoss", "install", "rnnt_loss", "uninstall"]

_PLACES = (("torchaudio.functional", "rnnt_loss"), ("torchaudio.transforms", "RNNTLoss"))
_REPLACED: list[tuple] = []  # (module, name, what was there)


def rnnt_loss(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int = -1,
    clamp: float = -1,
    reduction: str = "mean",
    fused_log_softmax: bool = True,
    in_place: bool = False,
) -> Tensor:
    """Returns ``torchaudio.functional.rnnt_loss``: see there.

    Lengths and targets may be any integers, logits any floating dtype and any strides. The loss is at least float32.
    ``in_place`` is ours: the backward pass writes the gradient over the logits and takes no memory of their size.
    """
    op = "compat.torchaudio.rnnt_loss"
    loss = lengths.rnnt_losses(
        *(op, logits, targets, logit_lengths, target_lengths, blank),
        clamp=clamp,
        fused_log_softmax=fused_log_softmax,
        in_place=in_place,
    )
    return losses.reduced(op, loss, reduction, zero_infinity=False)


class RNNTLoss(nn.Module):
    """``torchaudio.transforms.RNNTLoss``, and ``in_place`` as for ``rnnt_loss``."""

    def __init__(
        self,
        blank: int = -1,
        clamp: float = -1.0,
        reduction: str = "mean",
        fused_log_softmax: bool = True,
        in_place: bool = False,
    ) -> None:
        super().__init__()
        self.blank, self.clamp, self.reduction = blank, clamp, reduction
        self.fused_log_softmax, self.in_place = fused_log_softmax, in_place

    def forward(
        self, logits: Tensor, targets: Tensor, logit_lengths: Tensor, target_lengths: Tensor
    ) -> Tensor:
        options = self.blank, self.clamp, self.reduction, self.fused_log_softmax, self.in_place
        return rnnt_loss(logits, targets, logit_lengths, target_lengths, *options)


def install() -> None:
    """Puts this module's loss into torchaudio, or makes a torchaudio of it alone where none can be loaded."""
    if _REPLACED:
        return
    for path, name in _PLACES:
        try:
            module = importlib.import_module(path)
        except (ImportError, OSError):  # no torchaudio, or a binary for another torch
            module = _stand_in(path)
        _REPLACED.append((module, name, getattr(module, name, None)))
        setattr(module, name, globals()[name])


def uninstall() -> None:
    while _REPLACED:
        module, name, before = _REPLACED.pop()
        if before is not None:
            setattr(module, name, before)
        elif getattr(module, "fastasr", False):
            for path in (module.__name__, "torchaudio"):
                if getattr(sys.modules.get(path), "fastasr", False):
                    del sys.modules[path]


def _stand_in(path: str) -> ModuleType:
    parent, _, name = path.rpartition(".")
    for full in (parent, path):
        if full not in sys.modules:
            sys.modules[full] = ModuleType(full, __doc__)
            vars(sys.modules[full])["fastasr"] = True
    setattr(sys.modules[parent], name, sys.modules[path])
    sys.modules[parent].__path__ = getattr(sys.modules[parent], "__path__", [])
    return sys.modules[path]
