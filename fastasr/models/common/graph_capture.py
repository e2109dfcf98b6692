# SPDX-License-Identifier: Apache-2.0
"""Records a function as a CUDA graph."""

from collections.abc import Callable

import torch


def capture(function: Callable[[], object]) -> Callable[[], None]:
    """Records ``function``, which works on tensors with fixed addresses, and returns a function that replays it. It is
    called twice before, because libraries allocate memory and choose kernels at their first calls.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay
