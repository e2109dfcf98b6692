# SPDX-License-Identifier: Apache-2.0
"""Runs of a few steps of the tiny model."""

import os

import torch

from fastasr.recipe import parallel, training

TINY = {"size": "tiny", "max_duration": 8.0, "warmup": 5, "lr_batches": 300.0, "mask_after": 2}


def trainer(out, speech_sets, world=None, **options):
    units = training.learn_units("char", speech_sets[0])
    made = training.Options(out=out, **{**TINY, **options})
    return training.Trainer(made, *speech_sets, units, world, say=lambda text: None)


def process(rank, file, out, kind, sets, encoder="zipformer"):
    """Runs one of two processes that train together."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        trainer(out, sets, parallel.World(rank, 2, kind), steps=4, plain=True, encoder=encoder).run()
    finally:
        torch.distributed.destroy_process_group()
