// SPDX-License-Identifier: Apache-2.0
#include "cpu/layer_norm_lstm.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu/activation.h"
#include "cpu/instruction_sets.h"

#define FASTASR_BODY "cpu/layer_norm_lstm_body.h"
#include "cpu/each_instruction_set.h"

namespace fastasr::cpu {

#define FASTASR_DEFINE(C)                                                                                        \
  void layer_norm_lstm_forward(const LayerNormLstm<C>& p, C* y, C* cell, C* kept, C* scratch, Team& team,        \
                               int64_t begin, int64_t end) {                                                     \
    FASTASR_DISPATCH(forward_body<C>(p, y, cell, kept, scratch, team, begin, end));                              \
  }                                                                                                              \
  void layer_norm_lstm_backward(const LayerNormLstm<C>& p, const C* kept, const LayerNormLstmGradients<C>& grad, \
                                double* sums, C* scratch, Team& team, int64_t begin, int64_t end) {              \
    FASTASR_DISPATCH(backward_body<C>(p, kept, grad, sums, scratch, team, begin, end));                          \
  }

FASTASR_DEFINE(float)
FASTASR_DEFINE(double)

}  // namespace fastasr::cpu
