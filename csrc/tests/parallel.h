// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/ema/ema_scan.h"
#include "tests/check.h"

// Two ways in which a caller may run the tasks of a scan.
namespace fastasr::test {

inline const cpu::Parallel kSerial = [](int64_t tasks, int64_t, const std::function<void(int64_t, int64_t)>& f) {
  if (tasks > 0) f(0, tasks);
};
// Three threads take the tasks one by one, from the last to the first.
inline const cpu::Parallel kScattered = [](int64_t tasks, int64_t, const std::function<void(int64_t, int64_t)>& f) {
  constexpr int64_t kThreads = 3;
  on_threads(kThreads, [&](int64_t thread) {
    for (int64_t i = tasks; i-- > 0;)
      if (i % kThreads == thread) f(i, i + 1);
  });
};

}  // namespace fastasr::test
