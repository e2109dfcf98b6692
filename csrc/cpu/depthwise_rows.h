// SPDX-License-Identifier: Apache-2.0
// What the kernels on depthwise_tile.h share, per instruction set (no include guard): rows of a stripe in scratch
// memory, their prefetch, and sums of a channel.
#include "cpu/depthwise_tile.h"

// Scratch rows, 64-byte aligned, zeroed.
template <typename C>
class Rows {
 public:
  explicit Rows(int64_t rows) : memory_(new C[static_cast<size_t>(rows * kStripe + kSlack)]()) {
    rows_ = memory_.get();
    while (reinterpret_cast<uintptr_t>(rows_) % 64) rows_++;
  }
  C* operator[](int64_t row) { return rows_ + row * kStripe; }

 private:
  static constexpr int64_t kSlack = 64 / sizeof(C);
  std::unique_ptr<C[]> memory_;
  C* rows_;
};

// Not __builtin_prefetch: GCC takes a function that does nothing else for one without effect and drops its calls.
template <typename T>
FASTASR_INLINE void prefetch_row(const T* row) {
  for (int64_t c = 0; c < kStripe; c += 64 / static_cast<int64_t>(sizeof(T))) {
#if defined(__x86_64__) && defined(__GNUC__)
    asm volatile("prefetcht0 %0" : : "m"(row[c]));
#else
    __builtin_prefetch(row + c);
#endif
  }
}

template <typename C>
FASTASR_INLINE void clear_rows(C* rows, int64_t n) {
  for (int64_t i = 0; i < n * kStripe; i++) rows[i] = 0;
}

// Channels [first, first + n) of a vector, or of zeros where it is absent; those beyond are 0.
template <typename T, typename C>
void stage_vector(const T* vector, int64_t first, int64_t n, C* row) {
  for (int64_t c = 0; c < kStripe; c++) row[c] = vector && c < n ? load(vector[first + c]) : C(0);
}

FASTASR_INLINE int64_t whole_tiles(int64_t n) { return (n + kTile - 1) / kTile * kTile; }

// Sums of a channel: short chains of the compute type (a block's), added up in double.
template <typename C>
class Sums {
 public:
  explicit Sums(int64_t rows) : rows_(rows), part_(rows), total_(rows) {}
  void clear() {
    for (int64_t i = 0; i < rows_ * kStripe; i++) part_[0][i] = 0;
    for (int64_t i = 0; i < rows_ * kStripe; i++) total_[0][i] = 0;
  }
  C* part(int64_t row) { return part_[row]; }
  const double* total(int64_t row) { return total_[row]; }
  void carry(int64_t first, int64_t rows) {
    C* __restrict part = part_[first];
    double* __restrict total = total_[first];
#pragma omp simd
    for (int64_t i = 0; i < rows * kStripe; i++) {
      total[i] += static_cast<double>(part[i]);
      part[i] = 0;
    }
  }
  void add(int64_t row, const C* rows, int64_t n) {
    double* __restrict total = total_[row];
    for (int64_t i = 0; i < n; i++) {
#pragma omp simd
      for (int64_t c = 0; c < kStripe; c++) total[c] += static_cast<double>(rows[i * kStripe + c]);
    }
  }

 private:
  const int64_t rows_;
  Rows<C> part_;
  Rows<double> total_;
};
