# SPDX-License-Identifier: Apache-2.0
"""Runs of a few steps of the tiny model."""

from fastasr.recipe import training

TINY = {"size": "tiny", "max_duration": 8.0, "warmup": 5, "lr_batches": 300.0, "mask_after": 2}


def trainer(out, speech_sets, world=None, **options):
    units = training.learn_units("char", speech_sets[0])
    made = training.Options(out=out, **{**TINY, **options})
    return training.Trainer(made, *speech_sets, units, world, say=lambda text: None)
