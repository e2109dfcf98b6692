// SPDX-License-Identifier: Apache-2.0
#include "cpu/gemm/gemm.h"

#include <algorithm>
#include <cstring>

#include "cpu/gemm/amx.simd.h"
#include "cpu/gemm/words.simd.h"
#include "cpu/rows/swoosh.h"

namespace fastasr::cpu {
namespace {

// A tile's sums, two vectors wide, take all registers but those of one row of B and of a broadcast; on aarch64 GCC
// keeps several broadcasts at a time, and would spill sums of 14 rows.
constexpr int kLanes = Lanes<float>::count;
constexpr int64_t kVectorRows = kVectorBytes == 64 ? 14 : kRegisters == 32 ? 12 : kVectorBytes == 32 ? 6 : 4;
constexpr int64_t kColumns = 2 * kLanes;

// AMX's tiles multiply bfloat16: they have more rows, and read those of A one after another.
template <typename T>
constexpr bool kInTiles = kAmx && sizeof(T) == 2;
template <typename T>
constexpr int64_t kRows = kInTiles<T> ? kAmxMostRows : kVectorRows;

// A block has this many panels: its rows of A, of one chain, stay in the second cache, beside its part of C.
template <typename T>
constexpr int64_t kBlockRows = 96 / kRows<T>;
constexpr int64_t kBlockColumns = 512 / kColumns;

// All rows of A are multiplied by about this many words of the rows of B, which stay in the third cache, before the
// next ones: two threads would read a longer B from memory for every block of rows.
constexpr int64_t kGroupWords = 2304;

// A strip of columns has at most this many panels: its part of C and a chain of A fill the second cache at kStripRows
// rows.
constexpr int64_t kStripColumns = 256 / kColumns;
constexpr int64_t kStripRows = 512;

// How a product reads its operands: float, a word each, or bfloat16, two to a word.
template <typename T>
struct Words {
  static constexpr int64_t kEach = 4 / sizeof(T);
  static constexpr bool kShort = kEach > 1;
  static constexpr int64_t kUnit = kInTiles<T> ? kAmxWords : 1;  // words of 0 fill the last one
  FASTASR_INLINE int64_t count(int64_t k) { return (k + kEach * kUnit - 1) / (kEach * kUnit) * kUnit; }
  FASTASR_INLINE auto load(const float* p) {
    if constexpr (kShort)
      return load_words(p);
    else
      return at(p);
  }
  FASTASR_INLINE auto all(const float* p) {
    if constexpr (kShort)
      return broadcast(to_bits(*p));
    else
      return vector_of(*p);
  }
  template <typename V>
  FASTASR_INLINE Floats add(Floats sum, V x, V w) {
    if constexpr (kShort)
      return add_bf16(sum, x, w);
    else
      return sum + x * w;
  }
};

// The chains of k terms, by words. None reaches over the end of a part.
template <typename T>
struct Chains {
  int64_t k, depth, count;
  Chains(int64_t k_, int64_t longest, int64_t parts)
      : k(k_), depth(Words<T>::count(k)), count((depth / parts + longest - 1) / longest * parts) {}
  int64_t begin(int64_t i) const { return depth / Words<T>::kUnit * i / count * Words<T>::kUnit; }
  int64_t words(int64_t i) const { return begin(i + 1) - begin(i); }
  int64_t first(int64_t i) const { return begin(i) * Words<T>::kEach; }
  int64_t terms(int64_t i) const { return std::min(k, first(i + 1)) - first(i); }
};

// Copies kWidth rows of `words` words, `step` elements apart, as columns next to each other. Rows behind the first
// `there` repeat the last one; their results are not written.
template <int64_t kWidth, typename T>
FASTASR_INLINE void interleave(const T* __restrict in, int64_t step, int64_t words, int64_t there,
                               float* __restrict out) {
  constexpr int64_t kEach = Words<T>::kEach;
  const auto row = [&](int64_t w, int64_t k)
                       __attribute__((always_inline)) { return in + std::min(w, there - 1) * step + k * kEach; };
  int64_t k = 0;
  if constexpr (kWidth % kLanes == 0) {
    for (; k + kLanes <= words; k += kLanes)
      for (int64_t w = 0; w < kWidth; w += kLanes) {
        Floats r[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) std::memcpy(&r[i], row(w + i, k), sizeof r[i]);
        transpose<float>(r);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) put(out + (k + i) * kWidth + w, r[i]);
      }
  }
  if constexpr (kWidth < kLanes && 2 * kWidth >= kLanes) {  // a store reaches into the next column, which comes later
    for (; k + kLanes < words; k += kLanes) {
      Floats r[kLanes];
#pragma GCC unroll 16
      for (int64_t w = 0; w < kLanes; w++) std::memcpy(&r[w], row(std::min(w, kWidth - 1), k), sizeof r[w]);
      transpose<float>(r);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) put(out + (k + i) * kWidth, r[i]);
    }
  }
  for (; k < words; k++)
#pragma GCC unroll 16
    for (int64_t w = 0; w < kWidth; w++) std::memcpy(out + k * kWidth + w, row(w, k), 4);
}

// Copies the words of kWidth columns that lie next to each other, `along` elements from one term to the next.
template <int64_t kWidth>
FASTASR_INLINE void gather(const float* in, int64_t, float* out) {
  std::memcpy(out, in, sizeof(float) * kWidth);
}
template <int64_t kWidth>
FASTASR_INLINE void gather(const bfloat16* __restrict in, int64_t along, float* __restrict out) {
  uint32_t words[kWidth];
  for (int64_t w = 0; w < kWidth; w++)
    words[w] = static_cast<uint32_t>(in[w].bits) | static_cast<uint32_t>(in[w + along].bits) << 16;
  std::memcpy(out, words, sizeof words);
}

// Packs `width` rows of `depth` terms, one chain of an operand or a part of it, to panels, which are `step` words
// apart; `across` and `along` are its strides.
template <int64_t kWidth, typename T>
void pack_chain(const T* from, int64_t across, int64_t along, int64_t width, int64_t depth, float* out, int64_t step) {
  constexpr int64_t kEach = Words<T>::kEach;
  const int64_t words = Words<T>::count(depth), pairs = depth / kEach, panels = (width + kWidth - 1) / kWidth;
  // Packs panels of whole words, a few rows of the operand at a time where its rows run across the panels.
  int64_t p = 0, done = 0;
  if (across == 1) {
    p = width / kWidth, done = pairs;
    for (int64_t k = 0; k < pairs; k++)
      for (int64_t i = 0; i < p; i++)
        gather<kWidth>(from + i * kWidth + k * kEach * along, along, out + (i * step + k) * kWidth);
  } else if (along == 1) {
    // whole panels apart: their width is a constant
    for (; (p + 1) * kWidth <= width; p++)
      interleave<kWidth>(from + p * kWidth * across, across, pairs, kWidth, out + p * step * kWidth);
    for (; p < panels; p++)
      interleave<kWidth>(from + p * kWidth * across, across, pairs, width - p * kWidth, out + p * step * kWidth);
    done = pairs;
  }
  // the rest: panels from p on, and the last word of those before, where it holds one term
  for (int64_t q = 0; q < panels; q++) {
    const int64_t there = std::min(kWidth, width - q * kWidth);
    for (int64_t k = q < p ? done : 0; k < words; k++)
      for (int64_t w = 0; w < kWidth; w++) {
        T terms[kEach] = {};
        for (int64_t e = 0; e < kEach && w < there && k * kEach + e < depth; e++)
          terms[e] = from[(q * kWidth + w) * across + (k * kEach + e) * along];
        std::memcpy(out + (q * step + k) * kWidth + w, terms, sizeof terms);
      }
  }
}

// Does the same for the tiles of AMX: a panel holds the words of one row after those of another.
template <int64_t kWidth, typename T>
void pack_rows(const T* from, int64_t across, int64_t along, int64_t width, int64_t depth, float* out) {
  constexpr int64_t kEach = Words<T>::kEach;
  const int64_t words = Words<T>::count(depth), whole = depth / kEach / kLanes * kLanes;
  int64_t turned = 0;  // rows whose first words are done
  if (across == 1)
    for (; turned + kLanes <= width; turned += kLanes)
      for (int64_t k = 0; k < whole; k += kLanes) {
        Floats r[kLanes];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; i++) {
          float column[kLanes];
          gather<kLanes>(from + turned + (k + i) * kEach * along, along, column);
          r[i] = at(column);
        }
        transpose<float>(r);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; i++) put(out + (turned + i) * words + k, r[i]);
      }
  for (int64_t row = 0; row < (width + kWidth - 1) / kWidth * kWidth; row++) {
    const T* const in = from + std::min(row, width - 1) * across;
    char* const to = reinterpret_cast<char*>(out + row * words);
    int64_t k = row < turned ? whole * kEach : 0;
    if (along == 1) {
      std::memcpy(to, in, static_cast<size_t>(depth) * sizeof(T));
      k = depth;
    }
    for (; k < depth; k++) std::memcpy(to + k * sizeof(T), in + k * along, sizeof(T));
    std::memset(to + depth * sizeof(T), 0, static_cast<size_t>(4 * words) - depth * sizeof(T));
  }
}

// Packs panels [begin, end) of an operand of this width, all its chains.
template <int64_t kWidth, bool kByRows, typename T>
void pack(const T* in, int64_t across, int64_t along, const Lines& lines, int64_t width, const Chains<T>& chains,
          float* packed, int64_t begin, int64_t end) {
  const int64_t panels = (width + kWidth - 1) / kWidth, i = begin * kWidth;
  for (int64_t chain = 0; chain < chains.count; chain++) {
    const int64_t here = std::min(end * kWidth, width) - i, terms = chains.terms(chain), words = chains.words(chain);
    float* const out = packed + chains.begin(chain) * kWidth * panels + i * words;
    const T* const from = in + i * across;
    if constexpr (kByRows) {
      pack_rows<kWidth>(from + chains.first(chain) * along, across, along, here, terms, out);
      continue;
    }
    for (int64_t k = 0, run; k < terms; k += run) {
      const int64_t at = chains.first(chain) + k;
      run = lines.line ? std::min(terms - k, lines.line - at % lines.line) : terms;
      pack_chain<kWidth>(from + lines.at(at, along), across, along, here, run, out + k * kWidth, words);
    }
  }
}

// The rows of A for a tile: a packed panel, or where they lie, `row` floats apart. `next` are those of the next tile.
struct Panel {
  const float* a;
  int64_t row;  // 0: packed
  const float* next;
};

// What the last chain adds: a bias, and rows of another matrix, `row` floats apart.
struct Addends {
  const float *bias, *onto;
  int64_t row;
};

// Computes a tile of C: its first chain sets it, or adds to it with `add`; later chains add, and the last one adds the
// addends.
template <typename T, bool kPacked>
__attribute__((noinline)) void tile(const Panel& panel, const float* __restrict b, int64_t words,
                                    const Addends& addends, float* __restrict c, int64_t c_row, bool first) {
  constexpr int64_t kLine = 16, kEach = 3;  // one pointer reaches kEach rows
  Floats sum[kVectorRows][2] = {};
  const int64_t row = panel.row, twice = 2 * row;
  const float *start[(kVectorRows + kEach - 1) / kEach], *next = panel.next;
#pragma GCC unroll 16
  for (int64_t m = 0; m < kVectorRows; m += kEach) start[m / kEach] = panel.a + (kPacked ? 0 : m * row);
  const auto step = [&](int64_t k) __attribute__((always_inline)) {
    const auto left = Words<T>::load(b + k * kColumns), right = Words<T>::load(b + k * kColumns + kLanes);
#pragma GCC unroll 16
    for (int64_t m = 0; m < kVectorRows; m++) {
      const int64_t away = m % kEach == 0 ? 0 : m % kEach == 1 ? row : twice;
      const auto v = Words<T>::all(kPacked ? start[0] + k * kVectorRows + m : start[m / kEach] + away + k);
      sum[m][0] = Words<T>::add(sum[m][0], v, left);
      sum[m][1] = Words<T>::add(sum[m][1], v, right);
    }
  };
  if (!kPacked)
    for (; words >= kLine; words -= kLine, next += kLine) {
#pragma GCC unroll 16
      for (int64_t m = 0; m < kVectorRows; m++) __builtin_prefetch(next + m * row, 0, 3);
      for (int64_t i = 0; i < kLine; i++, b += kColumns) {
        step(0);
#pragma GCC unroll 16
        for (auto& from : start) {
          from++;
          asm("" : "+r"(from));  // pointers to all rows would not stay in registers
        }
      }
    }
  for (int64_t k = 0; k < words; k++) step(k);
  if (!first) {
#pragma GCC unroll 16
    for (int64_t m = 0; m < kVectorRows; m++) sum[m][0] += at(c + m * c_row), sum[m][1] += at(c + m * c_row + kLanes);
  }
  if (addends.bias) {
    const Vector<float> left = at(addends.bias), right = at(addends.bias + kLanes);
#pragma GCC unroll 16
    for (int64_t m = 0; m < kVectorRows; m++) sum[m][0] += left, sum[m][1] += right;
  }
  if (addends.onto) {
#pragma GCC unroll 16
    for (int64_t m = 0; m < kVectorRows; m++) {
      const float* const more = addends.onto + m * addends.row;
      sum[m][0] += at(more), sum[m][1] += at(more + kLanes);
    }
  }
#pragma GCC unroll 16
  for (int64_t m = 0; m < kVectorRows; m++) put(c + m * c_row, sum[m][0]), put(c + m * c_row + kLanes, sum[m][1]);
}

template <typename T>
FASTASR_INLINE void whole_tile(const Panel& panel, const float* b, int64_t words, const Addends& addends, float* c,
                               int64_t c_row, bool first) {
  if constexpr (sizeof(T) == 4)  // see in_place
    if (panel.row) return tile<T, false>(panel, b, words, addends, c, c_row, first);
  tile<T, true>(panel, b, words, addends, c, c_row, first);
}

// Computes the tile at the lower or right edge, whose part inside C is rows x columns, from a panel that has all rows.
template <typename T>
void edge_tile(const Panel& panel, const float* b, int64_t words, const Addends& addends, float* c, int64_t c_row,
               bool first, int64_t rows, int64_t columns) {
  alignas(64) float part[kVectorRows * kColumns] = {}, some[kColumns] = {};
  for (int64_t m = 0; m < rows && !first; m++)
    for (int64_t j = 0; j < columns; j++) part[m * kColumns + j] = c[m * c_row + j];
  if (addends.bias) std::copy_n(addends.bias, columns, some);
  whole_tile<T>(panel, b, words, {addends.bias ? some : nullptr, nullptr, 0}, part, kColumns, first);
  for (int64_t m = 0; m < rows; m++)
    for (int64_t j = 0; j < columns; j++) {
      c[m * c_row + j] = part[m * kColumns + j];
      if (addends.onto) c[m * c_row + j] += addends.onto[m * addends.row + j];
    }
}

// Computes tiles, whose parts inside C are rows x columns.
template <typename T>
class Tiles {
 public:
  FASTASR_MEMBER void run(const Panel& panel, const float* b, int64_t words, const Addends& addends, float* c,
                          int64_t c_row, bool first, int64_t rows, int64_t columns) {
    if constexpr (kInTiles<T>)
      in_tiles(panel.a, b, words, addends, c, c_row, first, rows, columns);
    else if (rows == kVectorRows && columns == kColumns)
      whole_tile<T>(panel, b, words, addends, c, c_row, first);
    else
      edge_tile<T>(panel, b, words, addends, c, c_row, first, rows, columns);
  }

 private:
  void in_tiles(const float* a, const float* b, int64_t words, const Addends& addends, float* c, int64_t c_row,
                bool first, int64_t rows, int64_t columns) {
    const auto [bias, onto, onto_row] = addends;
    alignas(64) float sums[kAmxMostRows][kColumns];
    tiles_.shape(rows > kAmxRows ? kAmxMostRows : kAmxRows, kAmxWords);
    tiles_.multiply(a, b, words, kAmxWords);
    tiles_.put(sums);
    for (int64_t m = 0; m < rows; m++, c += c_row) {
      const float* const more = onto ? onto + m * onto_row : nullptr;
      if (columns < kColumns) {
        for (int64_t j = 0; j < columns; j++)
          c[j] = sums[m][j] + (first ? 0 : c[j]) + (bias ? bias[j] : 0) + (more ? more[j] : 0);
        continue;
      }
      Floats left = at(sums[m]), right = at(sums[m] + kLanes);
      if (!first) left += at(c), right += at(c + kLanes);
      if (bias) left += at(bias), right += at(bias + kLanes);
      if (more) left += at(more), right += at(more + kLanes);
      put(c, left), put(c + kLanes, right);
    }
  }

  AmxTiles<T> tiles_;
};

template <typename T>
int64_t a_panels(const Gemm<T>& g) {
  return (g.m + kRows<T> - 1) / kRows<T>;
}
template <typename T>
int64_t b_panels(const Gemm<T>& g) {
  return (g.n + kColumns - 1) / kColumns;
}
// Says whether the products read the rows of A where they lie. A tile reads a few bytes of each of its rows at a time;
// rows that are multiples of 4 KiB apart would share a set of the first cache. Strips read all of A for every panel.
template <typename T>
bool in_place(const Gemm<T>& g) {
  const bool lines = g.a_lines.line || g.parts > 1;
  return sizeof(T) == 4 && g.a_depth == 1 && (lines || (g.a_row % 1024 && g.m > kStripRows));
}
template <typename T>
int64_t packed_a(const Gemm<T>& g) {
  return in_place(g) ? 0 : a_panels(g) * kRows<T> * Words<T>::count(g.k);
}
template <typename T>
int64_t packed_b(const Gemm<T>& g) {
  return b_panels(g) * kColumns * Words<T>::count(g.k);
}

// A task is a panel of A by a block of columns; neighbours in rows are worked on together.
template <typename T>
int64_t column_blocks(const Gemm<T>& g) {
  return (b_panels(g) + kBlockColumns - 1) / kBlockColumns;
}
template <typename T>
int64_t tasks(const Gemm<T>& g) {
  return a_panels(g) * column_blocks(g);
}

template <typename T>
Chains<T> chains_of(const Gemm<T>& g) {
  return {g.k, g.chain, g.parts};
}

template <typename T>
void pack_a(const Gemm<T>& g, float* packed, int64_t begin, int64_t end) {
  if (in_place(g)) return;
  pack<kRows<T>, kInTiles<T>>(g.a, g.a_row, g.a_depth, g.depth_lines, g.m, chains_of(g), packed, begin, end);
}
template <typename T>
void pack_b(const Gemm<T>& g, float* packed, int64_t begin, int64_t end) {
  pack<kColumns, false>(g.b, g.b_column, g.b_depth, Lines{}, g.n, chains_of(g), packed, begin, end);
}

// The rows of a block of A that is read where it lies, for one chain. Copies serve tiles over the end of a line.
class Rows {
 public:
  FASTASR_MEMBER void read(const Gemm<float>& g, int64_t first, int64_t words, int64_t p0, int64_t p1) {
    const int64_t part = g.k / g.parts, begin = first / part * g.part_step + first % part;
    for (int64_t p = p0; p < p1; p++) {
      const int64_t i = p * kVectorRows;
      const bool lies = i + kVectorRows <= g.m && g.a_lines.whole(i, kVectorRows) && g.a_row % 1024;
      float* const copy = rows_ + (p - p0) * kVectorRows * kStep;
      for (int64_t m = 0; m < kVectorRows && !lies; m++)  // the last row is repeated behind the end
        std::copy_n(g.a + begin + g.a_lines.at(std::min(i + m, g.m - 1), g.a_row), words, copy + m * kStep);
      const float* const at = lies ? g.a + begin + g.a_lines.at(i, g.a_row) : copy;
      panels_[p - p0] = {at, lies ? g.a_row : kStep, at};
      if (p > p0) panels_[p - p0 - 1].next = at;
    }
  }
  const Panel& operator[](int64_t i) const { return panels_[i]; }

 private:
  static constexpr int64_t kStep = kGemmChain + kLanes;  // rows do not share a set of the first cache
  Panel panels_[kBlockRows<float>];
  alignas(64) float rows_[kBlockRows<float> * kVectorRows * kStep];
};

// Computes a tile whose rows of C lie in several lines.
template <typename T>
void scattered_tile(const Gemm<T>& g, Tiles<T>& tiles, const Panel& panel, const float* b, int64_t words,
                    const Addends& addends, int64_t i, int64_t j, bool first, int64_t rows, int64_t columns) {
  alignas(64) float part[kRows<T> * kColumns];
  const auto row = [&](int64_t m) { return g.c + g.c_lines.at(i + m, g.c_row) + j; };
  for (int64_t m = 0; m < rows && !first; m++) std::copy_n(row(m), columns, part + m * kColumns);
  tiles.run(panel, b, words, addends, part, kColumns, first, rows, columns);
  for (int64_t m = 0; m < rows; m++) std::copy_n(part + m * kColumns, columns, row(m));
}

// Multiplies panels [p0, p1) of A, a block at most, by panels [q0, q1) of B, whose parts of one chain begin at `b`;
// calls ahead() before each tile. Without packed A the products read its rows.
template <typename T, typename F>
FASTASR_INLINE void one_chain(const Gemm<T>& g, const Chains<T>& chains, int64_t chain, const float* a, const float* b,
                              int64_t p0, int64_t p1, int64_t q0, int64_t q1, Tiles<T>& tiles, const F& ahead) {
  const bool lies = in_place(g), last = chain + 1 == chains.count, sets = chain == 0 && !g.add;
  const int64_t n = chains.words(chain);
  [[maybe_unused]] Rows read;
  if constexpr (sizeof(T) == 4)
    if (lies) read.read(g, chains.first(chain), n, p0, p1);
  const float* const ac = a + (lies ? 0 : chains.begin(chain) * kRows<T> * a_panels(g));
  for (int64_t q = q0; q < q1; q++, b += n * kColumns) {
    const int64_t j = q * kColumns, width = std::min(kColumns, g.n - j);
    for (int64_t p = p0; p < p1; p++) {
      ahead();
      const int64_t i = p * kRows<T>, rows = std::min(kRows<T>, g.m - i);
      const Panel panel = lies ? read[p - p0] : Panel{ac + p * n * kRows<T>, 0, nullptr};
      const Addends addends{last && g.bias ? g.bias + j : nullptr,
                            last && g.onto ? g.onto + i * g.onto_row + j : nullptr, g.onto_row};
      if (g.c_lines.whole(i, rows))
        tiles.run(panel, b, n, addends, g.c + g.c_lines.at(i, g.c_row) + j, g.c_row, sets, rows, width);
      else
        scattered_tile(g, tiles, panel, b, n, addends, i, j, sets, rows, width);
    }
  }
}

// Computes the activation of rows [i, last) and columns [j, j + count) of C.
template <typename T>
void activate(const Gemm<T>& g, int64_t i, int64_t last, int64_t j, int64_t count) {
  if (!g.swoosh_l) return;
  const auto& kernel = kernels<SwooshKernels<float>>();
  for (; i < last; i++) {
    float* const c = g.c + g.c_lines.at(i, g.c_row) + j;
    kernel.forward(c, nullptr, Mask::none, c, count, Swoosh::L);
  }
}

template <typename T>
void products(const Gemm<T>& g, const float* a, const float* b, int64_t begin, int64_t end) {
  const int64_t rows = a_panels(g), columns = b_panels(g), blocks = column_blocks(g);
  const Chains<T> chains = chains_of(g);
  Tiles<T> tiles;
  while (begin < end) {
    const int64_t at = begin / rows, first = begin % rows, last = std::min(rows, first + end - begin);
    const int64_t q0 = columns * at / blocks, q1 = columns * (at + 1) / blocks;
    const int64_t parts = (last - first + kBlockRows<T> - 1) / kBlockRows<T>;
    const int64_t groups = (chains.depth + kGroupWords - 1) / kGroupWords;
    for (int64_t group = 0; group < groups; group++)
      for (int64_t i = 0; i < parts; i++) {
        const int64_t p0 = first + (last - first) * i / parts, p1 = first + (last - first) * (i + 1) / parts;
        const int64_t end_chain = chains.count * (group + 1) / groups;
        for (int64_t chain = chains.count * group / groups; chain < end_chain; chain++) {
          const float* bc = b + (chains.begin(chain) * columns + q0 * chains.words(chain)) * kColumns;
          one_chain(g, chains, chain, a, bc, p0, p1, q0, q1, tiles, [] {});
        }
      }
    activate(g, first * kRows<T>, std::min(g.m, last * kRows<T>), q0 * kColumns,
             std::min(g.n, q1 * kColumns) - q0 * kColumns);
    begin += last - first;
  }
}

// Prefetches a rectangle of memory, `rows` rows of `count` elements, a few lines at a time.
template <typename T>
class Ahead {
 public:
  Ahead(const T* from, int64_t stride, int64_t rows, int64_t count)
      : from_(from), stride_(stride), rows_(rows), lines_((count + kLine - 1) / kLine) {}
  // Prefetches up to `count` more lines.
  void operator()(int64_t count) {
    for (; count > 0 && row_ < rows_; count--) {
      __builtin_prefetch(from_ + row_ * stride_ + line_ * kLine, 0, 2);
      if (++line_ == lines_) line_ = 0, row_++;
    }
  }
  int64_t left() const { return (rows_ - row_) * lines_; }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);
  const T* from_;
  int64_t stride_, rows_, lines_, row_ = 0, line_ = 0;
};

// B of panel q from term `first` on, which lies next to each other along one of the two.
template <typename T>
Ahead<T> part_of_b(const Gemm<T>& g, int64_t q, int64_t first, int64_t terms) {
  const int64_t columns = std::min(kColumns, g.n - q * kColumns);
  const T* from = g.b + first * g.b_depth + q * kColumns * g.b_column;
  if (g.b_depth == 1) return {from, g.b_column, columns, terms};
  return {from, g.b_depth, g.b_column == 1 ? terms : 0, columns};
}

template <typename T>
int64_t strip_count(const Gemm<T>& g, int64_t threads) {
  const int64_t panels = b_panels(g), least = (panels + kStripColumns - 1) / kStripColumns;
  const int64_t count = (least + threads - 1) / threads * threads;  // Each thread gets as many.
  return g.m <= kStripRows && !in_place(g) && 2 * count <= panels ? count : 0;
}

// Packs a panel, multiplies all rows of A by it and prefetches the next one meanwhile. More of B at a time would leave
// the second cache if rows of B lie a power of two apart, as rows of weights do.
template <typename T>
void strips(const Gemm<T>& g, const float* a, int64_t count, int64_t begin, int64_t end) {
  const int64_t rows = a_panels(g), panels = b_panels(g);
  const Chains<T> chains = chains_of(g);
  alignas(64) float panel[kColumns * kGemmChain];
  Tiles<T> tiles;
  for (int64_t strip = begin; strip < end; strip++) {
    const int64_t q0 = panels * strip / count, q1 = panels * (strip + 1) / count;
    for (int64_t chain = 0; chain < chains.count; chain++) {
      const int64_t first = chains.first(chain), terms = chains.terms(chain);
      for (int64_t q = q0; q < q1; q++) {
        const T* from = g.b + first * g.b_depth + q * kColumns * g.b_column;
        pack_chain<kColumns>(from, g.b_column, g.b_depth, std::min(kColumns, g.n - q * kColumns), terms, panel,
                             chains.words(chain));
        Ahead<T> next = q + 1 < q1                       ? part_of_b(g, q + 1, first, terms)
                        : chain + 1 < chains.count       ? part_of_b(g, q0, first + terms, chains.terms(chain + 1))
                        : strip + 1 < end && q1 < panels ? part_of_b(g, q1, 0, chains.terms(0))
                                                         : part_of_b(g, q, 0, 0);
        const int64_t each = next.left() / rows + 1;
        for (int64_t p = 0; p < rows; p += kBlockRows<T>)
          one_chain(g, chains, chain, a, panel, p, std::min(rows, p + kBlockRows<T>), q, q + 1, tiles,
                    [&] { next(each); });
      }
    }
    activate(g, 0, g.m, q0 * kColumns, std::min(g.n, q1 * kColumns) - q0 * kColumns);
  }
}

}  // namespace

FASTASR_TABLE(GemmKernels, .a_panels = a_panels<T>, .b_panels = b_panels<T>, .packed_a = packed_a<T>,
              .packed_b = packed_b<T>, .tasks = tasks<T>, .pack_a = pack_a<T>, .pack_b = pack_b<T>,
              .products = products<T>, .strip_count = strip_count<T>, .strips = strips<T>)
FASTASR_PROVIDE(GemmKernels, float)
FASTASR_PROVIDE(GemmKernels, bfloat16)

}  // namespace fastasr::cpu
