# SPDX-License-Identifier: Apache-2.0
"""The processor of this machine, as the system describes it."""

from functools import cache
from pathlib import Path


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
