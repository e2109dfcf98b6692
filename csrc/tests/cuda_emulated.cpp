// SPDX-License-Identifier: Apache-2.0
// The launchers of csrc/cuda over the emulation, as a library that Python loads: tests/kernels/test_cuda_contract.py.
#include "cuda/complex_ema_scan_launchers.h"
#include "cuda/ema_scan_launchers.h"
