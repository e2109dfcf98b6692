# SPDX-License-Identifier: Apache-2.0
"""The results of the demo, from which its report is made."""

from dataclasses import dataclass, field

import torch

import fastasr
from fastasr.asr.audio import recordings
from fastasr.benchmarks.harness import Timing

UPSTREAM, COMPILED, FASTASR = "upstream as shipped", "upstream, torch.compile", "fastasr"


@dataclass
class Story:
    """The results of one run of the demo."""

    speech: recordings.Speech
    features: torch.Tensor
    lengths: torch.Tensor
    size: str
    parameters: int
    swap: fastasr.SwapReport
    difference: float = 0.0
    first_calls: dict[str, float] = field(default_factory=dict)  # seconds
    timings: dict[str, Timing] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    stamp: dict = field(default_factory=dict)

    @property
    def audio_seconds(self) -> float:
        return sum(clip.seconds for clip in self.speech.utterances)


def replaced_by_class(report: fastasr.SwapReport) -> dict[tuple[str, str], int]:
    """Returns the number of replaced modules for every (class, kernels)."""
    found: dict[tuple[str, str], int] = {}
    for row in report.replaced:
        key = (row.class_name, " ".join(row.kernels) or "-")
        found[key] = found.get(key, 0) + 1
    return found
