// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "bindings/dispatch.h"
#include "cpu/gemm/skinny_gemm.h"

// The bindings of the streaming steps share this.
namespace fastasr {

inline void check_floats(const Tensor& t, int64_t numel, const char* name) {
  check(t.is_cpu() && dtype_of(t) == ScalarType::Float && t.is_contiguous() && t.numel() == numel, "fastasr", name,
        " must be ", numel, " contiguous floats on the CPU, got ", t.numel());
}

// Allocates `n` floats that begin on a huge page.
inline Tensor on_huge_pages(const Tensor& like, int64_t n) {
  constexpr int64_t kPage = (int64_t{2} << 20) / 4;
  const int64_t stride = 1;
  const Tensor memory = new_contiguous(like, {n + kPage});
  auto* base = mutable_data<float>(memory);
  cpu::advise_huge_pages(base, (n + kPage) * 4);
  const auto skip = static_cast<int64_t>((-reinterpret_cast<uintptr_t>(base) / 4) % kPage);
  AtenTensorHandle view;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(memory.get(), 1, &n, &stride, skip, &view));
  return Tensor(view);
}

// Implements cpu::Workers::run on torch's threads.
inline void run_parts(int64_t parts, void (*part)(const void*, int64_t), const void* context) {
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) part(context, i);
  });
}

}  // namespace fastasr
