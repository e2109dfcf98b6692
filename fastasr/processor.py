# SPDX-License-Identifier: Apache-2.0
"""The processor of this machine, as the system describes it, and how busy others keep it."""

import os
import time
from functools import cache
from pathlib import Path

# An idle machine of two cores waits for up to 4 % of a measurement, and its median round takes 1.1 times the shortest.
# One other thread beside two of ours makes that 40 %, or 1.35 and more.
_WAITED = 0.1  # the share of the time
_SPREAD = 1.25  # the median time of equal calls over the shortest


@cache
def fields(facts: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Returns the fields of the first processor in ``facts``; none where there is no such file."""
    found: dict[str, str] = {}
    try:
        for line in facts.read_text().splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    return found


def crowd(threads: int, facts: Path = Path("/proc/loadavg")) -> float:
    """Returns how many threads of other processes run or wait for a core at this moment, relative to the number that
    does not disturb ``threads`` of ours: above 1 they do. It returns 0 if the system does not say.
    """
    cores = os.cpu_count() or 1
    # Threads on more than a quarter of the cores slow our memory; more than the cores that we leave free delay ours.
    return max(0, _running(facts) - threads) / min(cores / 4, max(0.5, cores - threads))


def free_cores(facts: Path = Path("/proc/loadavg")) -> int:
    """Returns how many cores no thread of another process wants at this moment, while one of ours runs: at least one,
    and all if the system does not say.
    """
    return max(1, (os.cpu_count() or 1) - max(0, _running(facts) - 1))


def _running(facts: Path) -> int:
    """Returns how many threads run or wait for a core, 0 where the system does not say.

    ``facts`` counts them without the delay of its averages. In a container it counts those of the whole machine, as
    ``os.cpu_count`` counts its cores.
    """
    try:
        return int(facts.read_text().split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        return 0


class Load:
    """Watches for load by other processes while something is measured on ``threads`` threads.

    It reads three signs, because on some machines there is only one. Most systems count the threads that want a core,
    which is the only sign of a steady load beside us. A sandbox hides that number, a container with a few cores of a
    large machine hardly sees it move, and it ignores a limit on the container's time: there our own clocks tell that
    this thread had to wait, or that equal calls took different times. Averages such as ``os.getloadavg`` are a minute
    late and include this process's own earlier work.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._crowds: list[float] = []
        self._began, self._worked = time.perf_counter(), time.thread_time()

    @property
    def seconds(self) -> float:
        """Returns the time since the beginning."""
        return time.perf_counter() - self._began

    def look(self) -> None:
        """Counts the threads of other processes; call it between the calls that are measured."""
        self._crowds.append(crowd(self._threads))

    def is_high(self, *samples: list[float]) -> bool:
        """Says whether the load was high. Each list of ``samples`` has the times of equal calls."""
        waited = self.seconds - (time.thread_time() - self._worked)
        return (
            waited > _WAITED * self.seconds
            or sum(self._crowds) > len(self._crowds)
            or any(median(times) > _SPREAD * min(times) for times in samples if times)
        )


def median(values: list[float]) -> float:
    """Returns the middle value, or the mean of the two in the middle. To import ``statistics`` takes milliseconds."""
    ordered, half = sorted(values), len(values) // 2
    return (ordered[half] + ordered[~half]) / 2
