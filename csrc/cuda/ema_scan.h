// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

// Launchers of the EMA scan. Plain C interface, no torch and no CUDA header. Every pointer is a device pointer, nothing
// waits for the device, and the work goes to `stream`. Each function returns 0 or a CUDA error code.
extern "C" {

enum FastasrDtype { kFastasrFloat = 0, kFastasrBfloat16 = 1, kFastasrHalf = 2, kFastasrDouble = 3 };

// A tensor over (time, batch, channel) with strides in elements. data == nullptr stands for an absent one.
struct FastasrSequence {
  const void* data;
  int64_t time, batch, channel;
};

// Where `complex` is not 0, `damping` is alpha, `decay` delta, `expansion` theta (rows), `projection` gamma
// (rows, states, 2), and states are (batch, channels, states, 2).
//
// Parameters, residual and states are contiguous, in float (double where dtype is double). Sizes and options as in
// fastasr/ops/ema_scan.py; rows of the parameters: channels, twice that for direction 2.
struct FastasrEmaScan {
  int dtype, complex;
  int64_t length, batch, channels, states, truncation;
  int direction, activation;
  FastasrSequence x;
  const void *damping, *decay, *expansion, *projection;  // (rows, states)
  const void *residual, *state;                          // (channels) or null, (batch, channels, states) or null
  const unsigned char* mask;                             // (batch, length) contiguous or null, non-zero: padding
  void* workspace;                                       // the function's _workspace says how many bytes it holds
};

struct FastasrEmaScanGrads {
  FastasrSequence grad;    // dL/dy, x's dtype
  const void* grad_state;  // dL/d(final state) or null
  FastasrSequence dx;      // written
  void *ddamping, *ddecay, *dexpansion, *dprojection;
  void *dresidual, *dstate;  // null where the input is absent
};

int64_t fastasr_cuda_ema_scan_forward_workspace(const FastasrEmaScan* scan);
int64_t fastasr_cuda_ema_scan_backward_workspace(const FastasrEmaScan* scan, const FastasrEmaScanGrads* grads);
// final_state is (batch, channels, states) or null.
int fastasr_cuda_ema_scan_forward(const FastasrEmaScan* scan, FastasrSequence y, void* final_state, void* stream);
int fastasr_cuda_ema_scan_backward(const FastasrEmaScan* scan, const FastasrEmaScanGrads* grads, void* stream);

}  // extern "C"
