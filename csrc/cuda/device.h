// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the CUDA side of the binary sees of this machine. Plain C interface, no torch header.
extern "C" {
// Number of usable devices; minus the CUDA error code when there is none to ask (no driver: -35).
int fastasr_cuda_device_count();
// 0 when this binary holds code that the device can run, else the CUDA error code of a probe kernel.
int fastasr_cuda_probe(int device);
}
