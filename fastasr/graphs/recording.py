# SPDX-License-Identifier: Apache-2.0
"""One pass under construction, and the numbers that the host decides before each replay.

A *plan* is a function without arguments that returns numbers: it draws the random numbers and reads the schedules that
the unrecorded call would draw and read at this place. Recording calls no plan. Before each replay all plans run in the
order in which they were recorded, and one copy takes their numbers to the device. Kernels read them there: a part of
the pass that does not act in a replay returns at once.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor

from fastasr import _recording
from fastasr.models.common.schedules import peek
from fastasr.models.common.verdicts import Verdict, Verdicts

CAPACITY = 1 << 14  # A pass has at most this many numbers: a Zipformer-M has about 2,500.
MAX_VERDICTS = 1 << 12  # A pass has at most this many verdicts: a Zipformer-M has 178.


T = TypeVar("T")


class Recorder(Protocol):
    """Records the passes of one module: a :class:`fastasr.graphs.cuda.CudaRecorder`, or a stand-in for it."""

    def rehearse(self, function: Callable[[], object]) -> None: ...

    def record(self, function: Callable[[], T], recording: "Recording") -> tuple[Callable[[], None], T]: ...


class Unrecordable(Exception):
    """Raised while a call is recorded that cannot be; the message says why."""


class Recording:
    """The numbers of one pass: ``values`` on the device, ``now`` on the host.

    ``back`` is the Recording of the backward pass. Autograd's nodes ask for it here, because they run in autograd's own
    thread, where ``recording()`` is None.
    """

    def __init__(self, device: torch.device, back: "Recording | None" = None) -> None:
        self.device, self.back = device, back
        self.values = torch.zeros(CAPACITY, dtype=torch.float32, device=device)
        self.now = [0.0] * CAPACITY
        self.plans: list[tuple[Callable[[], Sequence[float]], int, int]] = []
        self.used = 0
        # (schedule, whether it was 0): a replay is valid while this holds
        self.phases: list[tuple[Any, bool]] = []
        # Whether modules that act on gradients may change them in place; and which columns of them they change.
        self.owned = False
        self.columns: tuple[int, int] | None = None
        # (listener, whether to call it), one for each verdict
        self.told: list[tuple[Callable[[Verdict], object], _recording.Numbers]] = []
        self.verdicts = torch.zeros(MAX_VERDICTS if back is None else 0, 16, dtype=torch.bool, device=device)

    def numbers(self, plan: Callable[[], Sequence[float]], count: int) -> "Numbers":
        """Returns the ``Numbers`` that ``plan`` returns before each replay."""
        # Each begins at a multiple of 16 bytes, because kernels are compiled apart for other addresses.
        begin = -(-self.used // 4) * 4 if count else self.used
        self.used = begin + count
        if self.used > CAPACITY:
            raise Unrecordable(f"more than {CAPACITY} numbers in one pass")
        self.plans.append((plan, begin, self.used))
        return Numbers(self, begin, self.values[begin : self.used])

    def phase(self, schedule: Any) -> bool:
        """Returns whether the schedule is 0 now. A replay is valid while the answer stays."""
        zero = peek(schedule) == 0.0
        self.phases.append((schedule, zero))
        return zero

    def verdict(self, hear: Callable[[Verdict], object], acts: _recording.Numbers) -> Tensor:
        """Returns a bool tensor () for an answer of the device. After each replay in which ``acts`` is on,
        ``hear(verdict)`` is called with a :class:`Verdict`.
        """
        if len(self.told) == MAX_VERDICTS:
            raise Unrecordable(f"more than {MAX_VERDICTS} verdicts in one pass")
        self.told.append((hear, acts))
        return self.verdicts[len(self.told) - 1, 0]

    def refuse(self, reason: str) -> NoReturn:
        """Ends the recording: calls of this kind run as they are, for this reason."""
        raise Unrecordable(reason)

    def holds(self) -> bool:
        """Says whether every schedule is 0 exactly where it was when this was recorded."""
        return all((peek(schedule) == 0.0) == zero for schedule, zero in self.phases)

    def decide(self) -> None:
        """Runs the plans and brings their numbers to the device."""
        for plan, begin, end in self.plans:
            found = plan()
            if end > begin:
                self.now[begin:end] = found
        if self.used:
            on_gpu = self.device.type == "cuda"
            numbers = torch.tensor(
                self.now[: self.used], dtype=torch.float32, device="cpu", pin_memory=on_gpu
            )
            self.values[: self.used].copy_(numbers, non_blocking=True)

    def tell(self) -> None:
        """Tells the verdicts of the replay to the listeners that acted: one copy for all, without waiting for it."""
        if self.told:
            found = Verdicts(self.verdicts[: len(self.told), 0])
            for i, (hear, acts) in enumerate(self.told):
                if acts.on:
                    hear(Verdict(found, i))


class Numbers:
    """A plan's numbers: ``values`` (count,) on the device, ``on`` (its first is not 0) on the host after ``decide``."""

    def __init__(self, recording: Recording, place: int, values: Tensor) -> None:
        self.recording, self.place, self.values = recording, place, values

    @property
    def on(self) -> bool:
        return self.recording.now[self.place] != 0.0
