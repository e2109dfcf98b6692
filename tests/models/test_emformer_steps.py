# SPDX-License-Identifier: Apache-2.0
"""A step of the Emformer's ``infer`` waits for no result of the device; on a GPU it is one graph."""

import pytest
import torch
from steps import seeded
from torch.utils._python_dispatch import TorchDispatchMode

from fastasr.models.emformer import Emformer


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(str(function))
        return function(*arguments, **(options or {}))


def _stream(memory: int, batch: int, device: str = "cpu"):
    """Returns an encoder, a chunk, and the states after a chunk."""
    seeded(0)
    encoder = Emformer(
        32, 2, 48, 2, 4, left_context_length=6, right_context_length=2, max_memory_size=memory
    ).to(device)
    for layer in encoder.emformer_layers:
        layer.packed_streaming = False  # the operations, as they are on a GPU
    chunk, lengths = torch.randn(batch, 6, 32, device=device), torch.full((batch,), 6, device=device)
    with torch.no_grad():
        *_, states = encoder.eval().infer(chunk, lengths)
    return encoder, (chunk, lengths), states


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("memory", [0, 3])
def test_nothing_is_read_back(memory, batch):
    encoder, inputs, states = _stream(memory, batch)
    with torch.no_grad(), Calls() as calls:
        encoder.infer(*inputs, states)
    assert any("layer_norm" in name for name in calls.names)
    assert not [name for name in calls.names if "_local_scalar_dense" in name or "nonzero" in name]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_wait_for_the_device():
    encoder, inputs, states = _stream(3, 2, "cuda")
    with torch.no_grad():
        encoder.infer(*inputs, [list(state) for state in states])
        torch.cuda.set_sync_debug_mode("error")
        try:
            encoder.infer(*inputs, [list(state) for state in states])
        finally:
            torch.cuda.set_sync_debug_mode("default")
