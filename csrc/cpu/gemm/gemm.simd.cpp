// SPDX-License-Identifier: Apache-2.0
#include "cpu/gemm/gemm.h"

#include <algorithm>
#include <cstring>

#include "cpu/simd/vectors.simd.h"

namespace fastasr::cpu {
namespace {

// A tile's sums, two vectors wide, take all registers but those of one row of B and of a broadcast; on aarch64 GCC
// keeps several broadcasts at a time, and would spill sums of 14 rows.
constexpr int kLanes = Lanes<float>::count;
constexpr int64_t kRows = kVectorBytes == 64 ? 14 : kRegisters == 32 ? 12 : kVectorBytes == 32 ? 6 : 4;
constexpr int64_t kColumns = 2 * kLanes;

// A block has this many panels: its rows of A, of one chain, stay in the second cache, beside its part of C.
constexpr int64_t kBlockRows = 96 / kRows;
constexpr int64_t kBlockColumns = 512 / kColumns;

// A strip of columns has at most this many panels: its part of C and a chain of A fill the second cache at kStripRows
// rows.
constexpr int64_t kStripColumns = 256 / kColumns;
constexpr int64_t kStripRows = 512;

struct Chains {
  int64_t depth, count;
  explicit Chains(int64_t k) : depth(k), count((k + kGemmChain - 1) / kGemmChain) {}
  int64_t begin(int64_t i) const { return depth * i / count; }
};

// Copies kWidth rows of `depth` elements, `step` apart, as columns next to each other.
template <int64_t kWidth>
FASTASR_INLINE void interleave(const float* __restrict in, int64_t step, int64_t depth, float* __restrict out) {
  int64_t k = 0;
  if constexpr (kWidth % kLanes == 0) {
    for (; k + kLanes <= depth; k += kLanes)
      for (int64_t w = 0; w < kWidth; w += kLanes) {
        Vector<float> r[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) r[i] = at(in + (w + i) * step + k);
        transpose<float>(r);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) put(out + (k + i) * kWidth + w, r[i]);
      }
  }
  if constexpr (kWidth < kLanes && 2 * kWidth >= kLanes) {  // a store reaches into the next column, which comes later
    for (; k + kLanes < depth; k += kLanes) {
      Vector<float> r[kLanes];
#pragma GCC unroll 16
      for (int64_t w = 0; w < kLanes; w++) r[w] = at(in + std::min(w, kWidth - 1) * step + k);
      transpose<float>(r);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) put(out + (k + i) * kWidth, r[i]);
    }
  }
  for (; k < depth; k++)
#pragma GCC unroll 16
    for (int64_t w = 0; w < kWidth; w++) out[k * kWidth + w] = in[w * step + k];
}

// Packs `width` rows of `depth` elements, one chain of an operand, to panels; `across` and `along` are its strides.
template <int64_t kWidth>
void pack_chain(const float* from, int64_t across, int64_t along, int64_t width, int64_t depth, float* out) {
  const int64_t whole = width / kWidth;
  int64_t p = 0;
  // Packs whole panels, a few rows of the operand at a time where its rows run across the panels.
  if (across == 1) {
    for (int64_t k = 0; k < depth; k++)
      for (int64_t i = 0; i < whole; i++)
        std::memcpy(out + (i * depth + k) * kWidth, from + i * kWidth + k * along, sizeof(float) * kWidth);
    p = whole;
  } else if (along == 1) {
    for (; p < whole; p++) interleave<kWidth>(from + p * kWidth * across, across, depth, out + p * depth * kWidth);
  }
  for (; p * kWidth < width; p++) {
    float* to = out + p * depth * kWidth;
    const int64_t there = std::min(kWidth, width - p * kWidth);
    for (int64_t k = 0; k < depth; k++, to += kWidth)
      for (int64_t w = 0; w < kWidth; w++) to[w] = w < there ? from[(p * kWidth + w) * across + k * along] : 0.0f;
  }
}

// Packs panels [begin, end) of an operand (width, depth), all its chains.
template <int64_t kWidth>
void pack(const float* in, int64_t across, int64_t along, int64_t width, int64_t depth, float* packed, int64_t begin,
          int64_t end) {
  const int64_t panels = (width + kWidth - 1) / kWidth, i = begin * kWidth;
  const Chains chains(depth);
  for (int64_t chain = 0; chain < chains.count; chain++) {
    const int64_t k0 = chains.begin(chain), n = chains.begin(chain + 1) - k0;
    pack_chain<kWidth>(in + k0 * along + i * across, across, along, std::min(end * kWidth, width) - i, n,
                       packed + k0 * kWidth * panels + i * n);
  }
}

// Computes a tile of C: its first chain sets it, the others are added, and the last adds the bias.
__attribute__((noinline)) void tile(const float* __restrict a, const float* __restrict b, int64_t depth,
                                    const float* bias, float* __restrict c, int64_t c_row, bool first) {
  Vector<float> sum[kRows][2] = {};
  for (int64_t k = 0; k < depth; k++, a += kRows, b += kColumns) {
    const Vector<float> left = at(b), right = at(b + kLanes);
#pragma GCC unroll 16
    for (int64_t m = 0; m < kRows; m++) {
      const Vector<float> v = vector_of(a[m]);
      sum[m][0] += v * left;
      sum[m][1] += v * right;
    }
  }
  if (!first) {
#pragma GCC unroll 16
    for (int64_t m = 0; m < kRows; m++) sum[m][0] += at(c + m * c_row), sum[m][1] += at(c + m * c_row + kLanes);
  }
  if (bias) {
    const Vector<float> left = at(bias), right = at(bias + kLanes);
#pragma GCC unroll 16
    for (int64_t m = 0; m < kRows; m++) sum[m][0] += left, sum[m][1] += right;
  }
#pragma GCC unroll 16
  for (int64_t m = 0; m < kRows; m++) put(c + m * c_row, sum[m][0]), put(c + m * c_row + kLanes, sum[m][1]);
}

// Computes the tile at the lower or right edge, whose part inside C is rows x columns.
void edge_tile(const float* a, const float* b, int64_t depth, const float* bias, float* c, int64_t c_row, bool first,
               int64_t rows, int64_t columns) {
  alignas(64) float part[kRows * kColumns], some[kColumns] = {};
  for (int64_t m = 0; m < rows && !first; m++)
    for (int64_t j = 0; j < columns; j++) part[m * kColumns + j] = c[m * c_row + j];
  for (int64_t m = first ? kRows : rows; m < kRows; m++)
    for (int64_t j = 0; j < kColumns; j++) part[m * kColumns + j] = 0;
  for (int64_t m = 0; m < rows && !first; m++)
    for (int64_t j = columns; j < kColumns; j++) part[m * kColumns + j] = 0;
  if (bias) std::copy_n(bias, columns, some);
  tile(a, b, depth, bias ? some : nullptr, part, kColumns, first);
  for (int64_t m = 0; m < rows; m++)
    for (int64_t j = 0; j < columns; j++) c[m * c_row + j] = part[m * kColumns + j];
}

int64_t a_panels(const Gemm& g) { return (g.m + kRows - 1) / kRows; }
int64_t b_panels(const Gemm& g) { return (g.n + kColumns - 1) / kColumns; }
int64_t packed_a(const Gemm& g) { return a_panels(g) * kRows * g.k; }
int64_t packed_b(const Gemm& g) { return b_panels(g) * kColumns * g.k; }

// A task is a panel of A by a block of columns; neighbours in rows are worked on together.
int64_t column_blocks(const Gemm& g) { return (b_panels(g) + kBlockColumns - 1) / kBlockColumns; }
int64_t tasks(const Gemm& g) { return a_panels(g) * column_blocks(g); }

void pack_a(const Gemm& g, float* packed, int64_t begin, int64_t end) {
  pack<kRows>(g.a, g.a_row, g.a_depth, g.m, g.k, packed, begin, end);
}
void pack_b(const Gemm& g, float* packed, int64_t begin, int64_t end) {
  pack<kColumns>(g.b, g.b_column, g.b_depth, g.n, g.k, packed, begin, end);
}

// Multiplies panels [p0, p1) of A by panels [q0, q1) of B, whose parts of one chain begin at `b`; calls ahead() before
// each tile.
template <typename F>
FASTASR_INLINE void one_chain(const Gemm& g, const Chains& chains, int64_t chain, const float* a, const float* b,
                              int64_t p0, int64_t p1, int64_t q0, int64_t q1, const F& ahead) {
  const int64_t k0 = chains.begin(chain), n = chains.begin(chain + 1) - k0;
  const float* ac = a + k0 * kRows * a_panels(g);
  const float* bias = chain + 1 == chains.count ? g.bias : nullptr;
  for (int64_t q = q0; q < q1; q++, b += n * kColumns) {
    const int64_t j = q * kColumns, width = std::min(kColumns, g.n - j);
    for (int64_t p = p0; p < p1; p++) {
      ahead();
      const int64_t i = p * kRows, height = std::min(kRows, g.m - i);
      float* c = g.c + i * g.c_row + j;
      const float* ap = ac + p * n * kRows;
      if (height == kRows && width == kColumns)
        tile(ap, b, n, bias ? bias + j : nullptr, c, g.c_row, chain == 0);
      else
        edge_tile(ap, b, n, bias ? bias + j : nullptr, c, g.c_row, chain == 0, height, width);
    }
  }
}

// Multiplies panels [p0, p1) of A by panels [q0, q1) of B, both packed.
void block(const Gemm& g, const float* a, const float* b, int64_t p0, int64_t p1, int64_t q0, int64_t q1) {
  const Chains chains(g.k);
  for (int64_t chain = 0; chain < chains.count; chain++) {
    const int64_t k0 = chains.begin(chain), n = chains.begin(chain + 1) - k0;
    one_chain(g, chains, chain, a, b + (k0 * b_panels(g) + q0 * n) * kColumns, p0, p1, q0, q1, [] {});
  }
}

void products(const Gemm& g, const float* a, const float* b, int64_t begin, int64_t end) {
  const int64_t rows = a_panels(g), columns = b_panels(g), blocks = column_blocks(g);
  while (begin < end) {
    const int64_t at = begin / rows, first = begin % rows, last = std::min(rows, first + end - begin);
    const int64_t q0 = columns * at / blocks, q1 = columns * (at + 1) / blocks;
    const int64_t parts = (last - first + kBlockRows - 1) / kBlockRows;
    for (int64_t i = 0; i < parts; i++)
      block(g, a, b, first + (last - first) * i / parts, first + (last - first) * (i + 1) / parts, q0, q1);
    begin += last - first;
  }
}

// Asks for a rectangle of memory, `rows` rows of `bytes`, a few lines at a time.
class Ahead {
 public:
  Ahead(const float* from, int64_t stride, int64_t rows, int64_t count)
      : from_(from), stride_(stride), rows_(rows), lines_((count + kLine - 1) / kLine) {}
  // Asks for up to `count` more lines.
  void operator()(int64_t count) {
    for (; count > 0 && row_ < rows_; count--) {
      __builtin_prefetch(from_ + row_ * stride_ + line_ * kLine, 0, 2);
      if (++line_ == lines_) line_ = 0, row_++;
    }
  }
  int64_t left() const { return (rows_ - row_) * lines_; }

 private:
  static constexpr int64_t kLine = 64 / sizeof(float);
  const float* from_;
  int64_t stride_, rows_, lines_, row_ = 0, line_ = 0;
};

// B of panel q and depths [k0, k1), which lies next to each other along one of the two.
Ahead part_of_b(const Gemm& g, int64_t q, int64_t k0, int64_t k1) {
  const int64_t columns = std::min(kColumns, g.n - q * kColumns);
  const float* from = g.b + k0 * g.b_depth + q * kColumns * g.b_column;
  if (g.b_depth == 1) return {from, g.b_column, columns, k1 - k0};
  return {from, g.b_depth, g.b_column == 1 ? k1 - k0 : 0, columns};
}

int64_t strip_count(const Gemm& g, int64_t threads) {
  const int64_t panels = b_panels(g), least = (panels + kStripColumns - 1) / kStripColumns;
  const int64_t count = (least + threads - 1) / threads * threads;  // as many for each thread
  return g.m <= kStripRows && 2 * count <= panels ? count : 0;
}

// Packs a panel, multiplies all rows of A by it and asks for the next one meanwhile: more of B at a time would not stay
// in the second cache where rows of B lie a power of two apart, as those of weights do.
void strips(const Gemm& g, const float* a, int64_t count, int64_t begin, int64_t end) {
  const int64_t rows = a_panels(g), panels = b_panels(g);
  const Chains chains(g.k);
  alignas(64) float panel[kColumns * kGemmChain];
  for (int64_t strip = begin; strip < end; strip++) {
    const int64_t q0 = panels * strip / count, q1 = panels * (strip + 1) / count;
    for (int64_t chain = 0; chain < chains.count; chain++) {
      const int64_t k0 = chains.begin(chain), k1 = chains.begin(chain + 1);
      for (int64_t q = q0; q < q1; q++) {
        const float* from = g.b + k0 * g.b_depth + q * kColumns * g.b_column;
        pack_chain<kColumns>(from, g.b_column, g.b_depth, std::min(kColumns, g.n - q * kColumns), k1 - k0, panel);
        Ahead next = q + 1 < q1                       ? part_of_b(g, q + 1, k0, k1)
                     : chain + 1 < chains.count       ? part_of_b(g, q0, k1, chains.begin(chain + 2))
                     : strip + 1 < end && q1 < panels ? part_of_b(g, q1, 0, chains.begin(1))
                                                      : part_of_b(g, q, 0, 0);
        const int64_t each = next.left() / rows + 1;
        one_chain(g, chains, chain, a, panel, 0, rows, q, q + 1, [&] { next(each); });
      }
    }
  }
}

}  // namespace

FASTASR_KERNELS_FLOAT(GemmKernels, .a_panels = a_panels, .b_panels = b_panels, .packed_a = packed_a,
                      .packed_b = packed_b, .tasks = tasks, .pack_a = pack_a, .pack_b = pack_b, .products = products,
                      .strip_count = strip_count, .strips = strips)

}  // namespace fastasr::cpu
