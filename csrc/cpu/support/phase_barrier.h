// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <vector>

#include "cpu/simd/simd.h"

// A loop whose steps depend on each other, split among threads. Its phases have the same `units` of work each, and no
// unit of a phase starts before every unit of the previous phase has ended. Handing a phase of a few microseconds to a
// pool costs more than the phase, so the pool is entered once and the threads meet here.
//
// A thread does its own units, which keeps their weights in its core's cache, and waits. When others are late, because
// the pool runs them one after another or something else has their core, it takes their units over: one thread alone
// finishes everything, and the result does not depend on who does what.
namespace fastasr::cpu {

class PhaseBarrier {
 public:
  FASTASR_MEMBER explicit PhaseBarrier(int64_t units) : units_(units), next_(static_cast<size_t>(units)) {}

  // Runs phase number `phase` (0, 1, ... in order) for the thread that owns units [begin, end): some thread calls f(u)
  // for each unit u, from the last on if `backwards`. Returns when all units of the phase are done.
  template <typename F>
  void phase(int64_t phase, int64_t begin, int64_t end, const F& f, bool backwards = false) {
    const bool alone = end - begin == units_;
    for (int64_t i = begin; i < end; i++) {
      const int64_t unit = backwards ? begin + end - 1 - i : i;
      if (alone)
        run(unit, f);
      else
        take(unit, phase, f);
    }
    if (alone) return;
    const int64_t all = units_ * (phase + 1);
    for (int64_t spins = 1; done_.load(std::memory_order_acquire) < all; spins++) {
      pause();
      if (spins % kPatience) continue;
      for (int64_t u = 0; u < units_; u++) take(u, phase, f);
      sched_yield();  // <thread> takes 0.2 s to compile
    }
  }

 private:
  static constexpr int64_t kPatience = 2000;  // pauses, some 20 to 100 us

  static FASTASR_MEMBER void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb" ::: "memory");  // waits some tens of cycles; `yield` is a nop on most processors
#endif
  }

  template <typename F>
  static __attribute__((noinline)) void run(int64_t unit, const F& f) {
    f(unit);
  }

  template <typename F>
  void take(int64_t unit, int64_t phase, const F& f) {
    int64_t expected = phase;
    if (!next_[static_cast<size_t>(unit)].compare_exchange_strong(expected, phase + 1, std::memory_order_acq_rel))
      return;
    run(unit, f);
    done_.fetch_add(1, std::memory_order_acq_rel);
  }

  int64_t units_;
  std::vector<std::atomic<int64_t>> next_;    // the phase a unit is to do next
  alignas(64) std::atomic<int64_t> done_{0};  // units, over all phases
};

}  // namespace fastasr::cpu
