// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

// The threads of a streaming step, which the caller lends: kernels know no thread pool.
namespace fastasr::cpu {

// Runs f(begin, end) over parts of [0, n). `run` calls part(context, i) for each i of [0, parts), on `parts` threads.
struct Workers {
  int64_t threads;
  void (*run)(int64_t parts, void (*part)(const void* context, int64_t i), const void* context);

  template <typename F>
  void split(int64_t n, int64_t least, const F& f) const {
    const int64_t most = least > 0 ? n / least : n, parts = threads < most ? threads : most;
    if (parts <= 1) {
      if (n > 0) f(int64_t{0}, n);
      return;
    }
    struct Context {
      const F& f;
      int64_t n, parts;
    } context{f, n, parts};
    run(
        parts,
        [](const void* c, int64_t i) {
          const auto& all = *static_cast<const Context*>(c);
          all.f(all.n * i / all.parts, all.n * (i + 1) / all.parts);
        },
        &context);
  }
};

}  // namespace fastasr::cpu
