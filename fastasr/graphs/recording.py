# SPDX-License-Identifier: Apache-2.0
"""One pass under construction, and the numbers that the host decides before each replay.

A *plan* is a function without arguments that returns numbers: it draws the random numbers and reads the schedules that
the unrecorded call would draw and read at this place. Recording calls no plan. Before each replay all plans run in the
order in which they were recorded, and one copy takes their numbers to the device. Kernels read them there: a part of
the pass that does not act in a replay returns at once.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor

from fastasr import _recording
from fastasr.models.common.schedules import peek
from fastasr.models.common.verdicts import Verdict, Verdicts

T = TypeVar("T")
Phases = Sequence[tuple[Any, bool]]  # (schedule, whether it was 0)


class Recorder(Protocol):
    """Records the passes of one module: a :class:`fastasr.graphs.cuda.CudaRecorder`, or a stand-in for it."""

    def rehearse(self, function: Callable[[], object]) -> None: ...

    def record(self, function: Callable[[], T], recording: "Recording") -> tuple[Callable[[], None], T]: ...


class Unrecordable(Exception):
    """Raised while a call is recorded that cannot be; the message says why. It may become recordable when the
    ``phases`` change.
    """

    def __init__(self, reason: str, phases: Phases = ()) -> None:
        super().__init__(reason)
        self.phases = phases


def hold(phases: Phases) -> bool:
    """Says whether every schedule is 0 exactly where it was."""
    return all((peek(schedule) == 0.0) == zero for schedule, zero in phases)


class Room(NamedTuple):
    """How many numbers, verdicts and integers in tables a pass has. A Zipformer-M has some 2,500, 178 and 6,000."""

    numbers: int = 1 << 12
    verdicts: int = 1 << 8
    fields: int = 1 << 13


class Recording:
    """The numbers of one pass: ``values`` on the device, ``now`` on the host.

    ``back`` is the Recording of the backward pass. Autograd's nodes ask for it here, because they run in autograd's own
    thread, where ``recording()`` is None.
    """

    def __init__(
        self,
        device: torch.device,
        back: "Recording | None" = None,
        runs: bool = False,
        room: Room | None = None,
    ) -> None:
        """With ``runs`` kernels run while the pass is built, as in a rehearsal, which shows the ``room`` to take."""
        self.device, self.back, self.runs = device, back, runs
        numbers, verdicts, fields = room or Room()
        self.values = torch.zeros(numbers, dtype=torch.float32, device=device)
        self.now: list[float] = []
        self.plans: list[tuple[Callable[[], Sequence[float]], int, int]] = []
        self.used = 0
        self.phases: list[tuple[Any, bool]] = []  # A replay is valid while they last.
        # Whether modules that act on gradients may change them in place; and which columns of them they change.
        self.owned = False
        self.columns: tuple[int, int] | None = None
        # (listener, whether to call it), one for each verdict
        self.told: list[tuple[Callable[[Verdict], object], _recording.Numbers]] = []
        self.verdicts = torch.zeros(verdicts, 16, dtype=torch.bool, device=device)
        self.jobs: dict[Callable[..., list[Any]], list[Job]] = {}
        self.last: dict[Callable[..., object], list[Any]] = {}
        # leaf -> its gradient, which comes at the end, or None; all by address
        self.late: dict[int, int | None] = {}
        self.tables = torch.zeros(fields, dtype=torch.int64, device=device)
        self.fields: list[int] = []  # what lies in the tables

    def numbers(self, plan: Callable[[], Sequence[float]], count: int) -> "Numbers":
        """Returns the ``Numbers`` that ``plan`` returns before each replay."""
        # Each begins at a multiple of 16 bytes, because kernels are compiled apart for other addresses.
        begin = -(-self.used // 4) * 4 if count else self.used
        self.used = begin + count
        self.now += [0.0] * (self.used - len(self.now))
        self.plans.append((plan, begin, self.used))
        return Numbers(self, begin, self._piece(self.values, begin, self.used))

    @property
    def room(self) -> Room:
        """Returns the room that the pass has taken."""
        return Room(self.used, len(self.told), len(self.fields))

    def _piece(self, whole: Tensor, begin: int, end: int) -> Tensor:
        if self.runs:
            return whole.new_zeros(end - begin, *whole.shape[1:])
        if end > len(whole):
            raise Unrecordable("it needs more numbers than in its rehearsal")
        return whole[begin:end]

    def phase(self, schedule: Any) -> bool:
        """Returns whether the schedule is 0 now. A replay is valid while the answer stays."""
        zero = peek(schedule) == 0.0
        self.phases.append((schedule, zero))
        return zero

    def verdict(self, hear: Callable[[Verdict], object], acts: _recording.Numbers) -> Tensor:
        """Returns a bool tensor () for an answer of the device. After each replay in which ``acts`` is on,
        ``hear(verdict)`` is called with a :class:`Verdict`.
        """
        self.told.append((hear, acts))
        return self._piece(self.verdicts, len(self.told) - 1, len(self.told))[0, 0]

    def job(self, do: Callable[..., list[Any]], work: Any) -> "Job":
        """Has ``do(works, table)`` begin this pass, once for all jobs that were given it. It returns what it found for
        each; ``table`` brings rows of integers to the device, which are there when a replay begins.
        """
        job = Job(work)
        self.jobs.setdefault(do, []).append(job)
        return job

    def begin(self) -> None:
        """Does the jobs."""
        for do, jobs in self.jobs.items():
            for job, found in zip(jobs, do([job.work for job in jobs], self._table), strict=True):
                job.work, job.found = None, found
        self.jobs = {}

    def allow_late(self, leaves: Sequence[Tensor]) -> None:
        """Lets the gradients of leaves come at the end of this pass, because one node reads each leaf."""
        self.late = {leaf.data_ptr(): None for leaf in leaves}

    def later(self, leaf: Tensor, gradient: Tensor, do: Callable[..., object], work: Any) -> bool:
        """Has ``do(works, table)`` end this pass, once for all works that were given it, and returns True, if the
        gradient of ``leaf`` may come that late.
        """
        if self.runs or leaf.data_ptr() in self.late:  # nobody uses a rehearsal's gradients
            self.late[leaf.data_ptr()] = gradient.data_ptr()
            self.last.setdefault(do, []).append(work)
            return True
        return False

    def check_late(self, leaves: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Refuses a pass in which something read a gradient that comes late: autograd then has found another one."""
        for leaf, found in zip(leaves, gradients, strict=True):
            late = self.late.get(leaf.data_ptr())
            if late is not None and (found is None or found.data_ptr() != late or found._version):
                self.refuse("a bias has two gradients")

    def end(self) -> None:
        """Does what was to be done later."""
        for do, works in self.last.items():
            do(works, self._table)
        self.last = {}

    def _table(self, rows: Sequence[Sequence[int]]) -> Tensor:
        begin, fields = len(self.fields), [field for row in rows for field in row]
        self.fields += fields
        table = self._piece(self.tables, begin, len(self.fields))
        if self.runs:
            table.copy_(torch.tensor(fields, dtype=torch.int64, device="cpu"))
        return table.view(len(rows), -1)

    def bring_tables(self) -> None:
        """Brings the tables to the device. A capture brings nothing, so this comes after it."""
        self.tables[: len(self.fields)].copy_(torch.tensor(self.fields, dtype=torch.int64, device="cpu"))

    def refuse(self, reason: str) -> NoReturn:
        """Ends the recording: calls of this kind run as they are, for this reason, while the phases last."""
        raise Unrecordable(reason, self.phases)

    def holds(self) -> bool:
        """Says whether the phases last in which this was recorded."""
        return hold(self.phases)

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


class Job:
    """Work that is done at the beginning of a pass; ``take()`` returns what was found, once."""

    def __init__(self, work: Any) -> None:
        self.work, self.found = work, None

    def take(self) -> Any:
        found, self.found = self.found, None
        return found
