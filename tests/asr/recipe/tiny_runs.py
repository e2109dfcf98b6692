# SPDX-License-Identifier: Apache-2.0
"""Runs of a few steps of the tiny model."""

import csv
import runpy
from pathlib import Path

import pytest
import torch
import two_processes

from fastasr.asr.recipe import checkpoints, parallel, training

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
TINY = {"size": "tiny", "max_duration": 8.0, "warmup": 5, "lr_batches": 300.0, "mask_after": 2}


def trainer(out, speech_sets, world=None, **options):
    units = training.learn_units("char", speech_sets[0])
    made = training.Options(out=out, **{**TINY, **options})
    return training.Trainer(made, *speech_sets, units, world, say=lambda text: None)


def losses(out, column="loss"):
    with (out / "log.csv").open(newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file)]


def same_checkpoints(*folders):
    one, other = (checkpoints.load(folder / checkpoints.NAME) for folder in folders)
    for entry in ("model", "model_avg"):
        assert all(torch.equal(one[entry][name], other[entry][name]) for name in one[entry])


def run_example(name, *arguments):
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]([str(a) for a in arguments])


def refused(example, *arguments):
    """Returns the message with which an example ends."""
    with pytest.raises(SystemExit) as ended:
        run_example(example, *arguments)
    assert isinstance(ended.value.code, str)  # ends with 1
    return ended.value.code


def in_two_processes(tmp_path, kind, sets, encoder="zipformer"):
    """Runs two processes that train together, into the folder ``two``."""
    two_processes.run(_process, tmp_path, tmp_path / "two", kind, sets, encoder)


def _process(rank, out, kind, sets, encoder):
    trainer(out, sets, parallel.World(rank, 2, kind), steps=4, plain=True, encoder=encoder).run()
