# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch

pytest.importorskip("zipformer", reason="upstream's package is not installed")

import tiny_zipformer


@pytest.fixture(scope="session")
def _tiny():
    return tiny_zipformer.tiny()


@pytest.fixture
def model(_tiny):
    """Returns a fresh, unswapped tiny Zipformer."""
    return copy.deepcopy(_tiny)


@pytest.fixture
def inputs():
    return tiny_zipformer.batch()


@pytest.fixture(autouse=True)
def _one_thread():
    """Uses one thread: the shapes are tiny, so threads cost more than they bring, most of all beside
    other processes.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
