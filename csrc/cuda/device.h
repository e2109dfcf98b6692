// SPDX-License-Identifier: Apache-2.0
#pragma once

// The CUDA side's view of this machine, as a plain C interface without a torch header.
extern "C" {
// Returns the number of usable devices, or minus the CUDA error code when there is none to ask (no driver: -35).
int fastasr_cuda_device_count();
// Returns 0 if this binary holds code that the device can run, or the CUDA error code of a probe kernel.
int fastasr_cuda_probe(int device);
}
