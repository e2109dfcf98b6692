// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Keeps the caller's registers on its stack, whose place goes to *from, and goes on where the stack ``to`` was left. A
// swapcontext makes two system calls, and address sanitizer's clears the other stack's shadow at every one.
extern "C" void fastasr_switch_stack(void** from, void* to);
asm(R"(
.text
.type fastasr_switch_stack, @function
fastasr_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastasr_switch_stack, . - fastasr_switch_stack
)");

// Runs CUDA kernel bodies on the CPU: every CUDA thread is a fiber, a barrier hands over to the others. Shared memory
// holds NaNs when a block starts and ends with its last byte (address sanitizer). The order in which threads run
// between barriers is a parameter: a body that lacks a barrier gives other results in another order, and a warp may
// run ahead of the others. The blocks of a launch run in ascending or descending order, so a block that reads what
// another one writes gives other results too. A barrier that some thread does not reach ends the program.
struct Dim3 {
  unsigned x = 0, y = 0, z = 0;
};
inline Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace fastasr::test {

enum class Order { kAscending, kDescending, kShuffled };

class Emulator {
 public:
  static Emulator& get() {
    static Emulator emulator;
    return emulator;
  }

  Order order = Order::kAscending;
  int64_t launches = 0, largest_shared = 0;

  void run(int64_t blocks, int threads, int64_t shared, const std::function<void()>& body) {
    launches++;
    if (shared > largest_shared) largest_shared = shared;
    body_ = &body;
    while (static_cast<int>(fibers_.size()) < threads) fibers_.push_back(std::make_unique<Fiber>());
    threads_ = threads;
    blockDim = {static_cast<unsigned>(threads), 1, 1};
    gridDim = {static_cast<unsigned>(blocks), 1, 1};
    for (int64_t b = 0; b < blocks; b++) {
      blockIdx = {static_cast<unsigned>(order == Order::kDescending ? blocks - 1 - b : b), 0, 0};
      memory_.reset(new unsigned char[static_cast<size_t>(shared) + 1]);
      shared_ = memory_.get();
      std::memset(shared_, 0xff, static_cast<size_t>(shared));
      run_block();
    }
  }

  unsigned char* shared() { return shared_; }

  void block_barrier() { wait(State::kBlock); }

  uint32_t warp_barrier(bool predicate) {
    fibers_[static_cast<size_t>(current_)]->predicate = predicate;
    wait(State::kWarp);
    return fibers_[static_cast<size_t>(current_)]->ballot;
  }

 private:
  enum class State { kReady, kBlock, kWarp, kDone };
  static constexpr size_t kStack = 256 * 1024;
  struct Fiber {
    std::unique_ptr<char[]> stack{new char[kStack]};
    void* place = nullptr;
    State state = State::kDone;
    bool predicate = false;
    uint32_t ballot = 0;
    void* fake_stack = nullptr;

    // Makes the first switch to this fiber call entry().
    void begin() {
#if defined(__SANITIZE_ADDRESS__)
      __asan_unpoison_memory_region(stack.get(), kStack);  // the last fiber's entry() did not return
#endif
      const uintptr_t end = reinterpret_cast<uintptr_t>(stack.get() + kStack) & ~uintptr_t{15};
      void** top = reinterpret_cast<void**>(end) - 8;  // six registers, entry's address, where entry would return to
      std::memset(top, 0, 8 * sizeof(void*));
      top[6] = reinterpret_cast<void*>(&Emulator::entry);
      place = top;
      state = State::kReady;
      fake_stack = nullptr;
    }
  };

  static void entry() {
    Emulator& e = get();
    e.finish_switch(nullptr);
    (*e.body_)();
    e.fibers_[static_cast<size_t>(e.current_)]->state = State::kDone;
    e.to_scheduler(true);
  }

  void finish_switch([[maybe_unused]] void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack_, &scheduler_size_);
#endif
  }

  void to_scheduler([[maybe_unused]] bool last) {
    Fiber& f = *fibers_[static_cast<size_t>(current_)];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(last ? nullptr : &f.fake_stack, scheduler_stack_, scheduler_size_);
#endif
    fastasr_switch_stack(&f.place, scheduler_);
    finish_switch(f.fake_stack);
  }

  void wait(State state) {
    fibers_[static_cast<size_t>(current_)]->state = state;
    to_scheduler(false);
  }

  void resume(int index) {
    Fiber& f = *fibers_[static_cast<size_t>(index)];
    current_ = index;
    threadIdx = {static_cast<unsigned>(index), 0, 0};
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, f.stack.get(), kStack);
    fastasr_switch_stack(&scheduler_, f.place);
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(fake_stack, &bottom, &size);
#else
    fastasr_switch_stack(&scheduler_, f.place);
#endif
  }

  void run_block() {
    for (int i = 0; i < threads_; i++) fibers_[static_cast<size_t>(i)]->begin();
    for (;;) {
      // Runs to the block's barrier or the end: warp after warp, or all of them in step.
      if (order == Order::kShuffled) {
        while (advance_all()) {
        }
      } else {
        for (int i = 0; i < threads_; i += 32) {
          const int first = order == Order::kDescending ? threads_ - 32 - i : i;
          while (advance_warp(first)) {
          }
        }
      }
      int waiting = 0, done = 0;
      for (int i = 0; i < threads_; i++) {
        waiting += fibers_[static_cast<size_t>(i)]->state == State::kBlock;
        done += fibers_[static_cast<size_t>(i)]->state == State::kDone;
      }
      if (done == threads_) return;
      if (waiting < threads_) {
        std::printf("a barrier was not reached by every thread: %d wait, %d have returned\n", waiting, done);
        std::abort();
      }
      for (int i = 0; i < threads_; i++) fibers_[static_cast<size_t>(i)]->state = State::kReady;
    }
  }

  // Both return whether a thread ran.
  bool advance_warp(int first) {
    bool ran = false;
    for (int i = 0; i < 32; i++) {
      const int index = first + (order == Order::kDescending ? 31 - i : i);
      if (fibers_[static_cast<size_t>(index)]->state == State::kReady) resume(index), ran = true;
    }
    release_warp(first);
    return ran;
  }

  bool advance_all() {
    bool ran = false;
    for (int i = 0; i < threads_; i++) {
      const int index = static_cast<int>((static_cast<unsigned>(i) * 77u + round_ * 13u) % threads_);
      if (fibers_[static_cast<size_t>(index)]->state == State::kReady) resume(index), ran = true;
    }
    round_++;
    for (int w = 0; w < threads_; w += 32) release_warp(w);
    return ran;
  }

  void release_warp(int first) {
    uint32_t ballot = 0;
    for (int lane = 0; lane < 32; lane++) {
      const Fiber& f = *fibers_[static_cast<size_t>(first + lane)];
      if (f.state != State::kWarp) return;
      ballot |= static_cast<uint32_t>(f.predicate) << lane;
    }
    for (int lane = 0; lane < 32; lane++) {
      Fiber& f = *fibers_[static_cast<size_t>(first + lane)];
      f.ballot = ballot;
      f.state = State::kReady;
    }
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::unique_ptr<unsigned char[]> memory_;
  unsigned char* shared_ = nullptr;
  const std::function<void()>* body_ = nullptr;
  void* scheduler_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_size_ = 0;
  int threads_ = 0, current_ = 0;
  unsigned round_ = 0;
};

}  // namespace fastasr::test

#define FASTASR_HD inline
#define FASTASR_DEVICE inline
#define FASTASR_KERNEL(threads, blocks_per_sm) void
#define FASTASR_DYNAMIC_SHARED(name) unsigned char* name = fastasr::test::Emulator::get().shared()

inline void __syncthreads() { fastasr::test::Emulator::get().block_barrier(); }
inline void __syncwarp() { fastasr::test::Emulator::get().warp_barrier(false); }
inline uint32_t __ballot_sync(uint32_t, bool predicate) {
  return fastasr::test::Emulator::get().warp_barrier(predicate);
}
inline uint32_t __brev(uint32_t v) {
  uint32_t reversed = 0;
  for (int i = 0; i < 32; i++) reversed |= (v >> i & 1u) << (31 - i);
  return reversed;
}

namespace fastasr::cuda {

using std::erf;
using std::exp;
using std::exp2;
using std::fma;
using std::log1p;
using std::log2;
using std::rint;
using std::tanh;

inline double sinpi(double x) { return static_cast<double>(std::sin(3.14159265358979323846L * x)); }
inline double cospi(double x) { return static_cast<double>(std::cos(3.14159265358979323846L * x)); }
inline float sinpi(float x) { return static_cast<float>(sinpi(static_cast<double>(x))); }
inline float cospi(float x) { return static_cast<float>(cospi(static_cast<double>(x))); }

template <typename Parameters>
int launch(void (*kernel)(Parameters), int64_t blocks, int threads, int64_t shared, void*,
           const Parameters& parameters) {
  test::Emulator::get().run(blocks, threads, shared, [&] { kernel(parameters); });
  return 0;
}

}  // namespace fastasr::cuda
