# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of whole models: one file per model, each with ``NAME`` and ``measure``."""

from fastasr.benchmarks.models import (
    e_branchformer,
    emformer,
    emformer_rnnt,
    mega,
    mega_step,
    pruned_transducer,
    recipe_step,
    streaming_engine,
    transcribe,
    zipformer,
    zipformer_front_end,
    zipformer_streaming,
    zipformer_training,
)

MODULES = (
    zipformer,
    zipformer_training,
    zipformer_streaming,
    streaming_engine,
    zipformer_front_end,
    mega,
    mega_step,
    e_branchformer,
    emformer,
    emformer_rnnt,
    pruned_transducer,
    recipe_step,
    transcribe,
)


def names() -> list[str]:
    return [module.NAME for module in MODULES]
