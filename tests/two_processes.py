# SPDX-License-Identifier: Apache-2.0
"""Two processes of one gloo group."""

import os
import sys

import torch
import torch.distributed as dist


def run(function, folder, *arguments):
    """Calls ``function(rank, *arguments)`` in both, each on one thread. What one raises, this raises.

    ``folder`` gets the file by which they find each other.
    """
    torch.multiprocessing.spawn(_process, (function, folder / "rendezvous", arguments), nprocs=2)


def _process(rank, function, file, arguments):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    function(rank, *arguments)
    dist.destroy_process_group()
    # Threads of gloo outlive the group. If one frees the tensors of the last exchange while the interpreter ends,
    # the process aborts (torch 2.13), although all went well: so end without that.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
