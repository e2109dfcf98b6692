# SPDX-License-Identifier: Apache-2.0
"""DDP and FSDP2 on two gloo processes."""

import distributed_workers
import pytest
import torch
import two_processes

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch without gloo",
)


def test_ddp_and_fsdp2_on_two_processes(tmp_path):
    two_processes.run(distributed_workers.run, tmp_path)
