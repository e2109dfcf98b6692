# SPDX-License-Identifier: Apache-2.0
"""What nodes of a CUDA graph cost on a device: launched, switched off, and to switch."""

import time
from collections.abc import Callable
from functools import partial

import torch

from fastasr.benchmarks.device.checks import reported
from fastasr.benchmarks.device.machine import GPU, Skipped

NODES = (500, 5000)
REPLAYS = 20


def time_nodes(tell: Callable, machine: GPU) -> None:
    """Tells microseconds of a node that is on, of one that is off, and of a switch."""
    reported(tell, "nodes", partial(_time_nodes, tell, machine))


def _time_nodes(tell: Callable, machine: GPU) -> None:
    if machine.dry:
        raise Skipped("a dry run has no GPU")
    from cuda.bindings import runtime

    x = torch.zeros(1024, dtype=torch.float32, device=machine.device)
    for count in NODES:
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            for _ in range(count):
                x.add_(1)
        graph.instantiate()
        raw, executable = graph.raw_cuda_graph(), graph.raw_cuda_graph_exec()
        *_, found = runtime.cudaGraphGetNodes(raw, 0)
        _, nodes, found = runtime.cudaGraphGetNodes(raw, found)
        times = {"nodes": count, "on_us": _replayed(graph) / count}
        for name, chosen in (("half_off_us", nodes[::2]), ("off_us", nodes[1::2])):
            begin = time.perf_counter()
            for node in chosen:
                (error,) = runtime.cudaGraphNodeSetEnabled(executable, node, 0)
                assert not int(error), error
            times["switch_us"] = (time.perf_counter() - begin) / len(chosen) * 1e6
            times[name] = _replayed(graph) / count
        tell({"graph_nodes": times})


def _replayed(graph) -> float:
    """Returns microseconds of a replay."""
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(REPLAYS):
        graph.replay()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / REPLAYS * 1e6
