# SPDX-License-Identifier: Apache-2.0
"""Tests marked ``gpu`` are skipped where there is no CUDA device. Tests of whole models are seeded, on one thread. With
FASTASR_LEDGER a test that has passed with the same files is skipped.
"""

import os

import pytest
import torch
from steps import one_thread, seeded

# The models are tiny: threads cost more than they bring, most of all beside other processes.
TINY_MODELS = {"models", "parity", "recipe", "streaming", "swap"}


def pytest_configure(config):
    if path := os.environ.get("FASTASR_LEDGER"):
        from ledger import Ledger

        config.pluginmanager.register(Ledger(path))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items):
    inner = [item for item in items if item.get_closest_marker("inner")]
    yield
    items += [item for item in inner if item not in items]
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _repeatable(request):
    if request.path.parent.name not in TINY_MODELS:
        yield
        return
    with one_thread():
        seeded(0)
        yield
