# SPDX-License-Identifier: Apache-2.0
"""Recorded encoders under DistributedDataParallel on two gloo processes, with ``no_sync`` and views of buckets."""

import ddp_workers
import pytest
import torch
import two_processes


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch without gloo",
)
def test_two_processes(tmp_path):
    two_processes.run(ddp_workers.run, tmp_path)
