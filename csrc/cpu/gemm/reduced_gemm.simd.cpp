// SPDX-License-Identifier: Apache-2.0
#include "cpu/gemm/reduced_gemm.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <ctime>
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#include "cpu/gemm/amx.simd.h"
#include "cpu/gemm/words.simd.h"

namespace fastasr::cpu {
namespace {

constexpr int kLanes = Lanes<float>::count;

// Two vectors of columns make a tile; its sums take the registers that weights, a broadcast and, without an instruction
// for the whole, halves of sums leave.
constexpr int64_t kTileColumns = 2 * kLanes;
#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD)
constexpr int64_t kRows = 14;
#elif defined(__AVX512F__)
constexpr int64_t kRows = 12;
#elif defined(__AVX2__)
constexpr int64_t kRows = 5;
#else
constexpr int64_t kRows = 3;
#endif

// Without VNNI two products are added in 16 bits, which saturate: 7 bits of x keep the sum below 2^15.
#if defined(__AVX512VNNI__) || !defined(__AVX2__)
constexpr int32_t kLevels = 255;
#else
constexpr int32_t kLevels = 127;
#endif

// Arm's first instruction multiplies signed bytes alone: it gets 128 less than each byte of x.
#if defined(__ARM_FEATURE_DOTPROD) && !defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int32_t kShift = 128;
#else
constexpr int32_t kShift = 0;
#endif

// Weights that several rows share while they are in a cache; the processors that have AMX have one of 2 MiB. Few rows
// are no more than a task for each block, and get more of them.
constexpr int64_t kBlockBytes = int64_t{1} << 18, kTileBlockBytes = int64_t{1} << 20, kManyRows = 256;

template <typename T>
struct Format;
template <>
struct Format<int8_t> {
  using Sum = Ints;
  // Adds the four products of each word: unsigned bytes of x, signed bytes of w.
  FASTASR_INLINE Sum dot(Sum sum, Ints x, Ints w) {
#if defined(__AVX512VNNI__)
    return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(x),
                                                      reinterpret_cast<__m512i>(w)));
#elif defined(__AVX512F__)
    const __m512i pairs = _mm512_maddubs_epi16(reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(w));
    return sum + reinterpret_cast<Ints>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#elif defined(__AVX2__)
    const __m256i pairs = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(x), reinterpret_cast<__m256i>(w));
    return sum + reinterpret_cast<Ints>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#elif defined(__ARM_FEATURE_MATMUL_INT8)
    return vusdotq_s32(sum, reinterpret_cast<uint8x16_t>(x), reinterpret_cast<int8x16_t>(w));
#elif defined(__ARM_FEATURE_DOTPROD)
    const Ints shifted = x ^ broadcast(static_cast<int32_t>(0x80808080u));
    return vdotq_s32(sum, reinterpret_cast<int8x16_t>(shifted), reinterpret_cast<int8x16_t>(w));
#else
    const auto part = [&](int shift)
                          __attribute__((always_inline)) { return ((x >> shift) & 255) * ((w << (24 - shift)) >> 24); };
    return sum + part(0) + part(8) + part(16) + part(24);
#endif
  }
};

template <>
struct Format<bfloat16> {
  using Sum = Floats;
  FASTASR_INLINE Sum dot(Sum sum, Ints x, Ints w) { return add_bf16(sum, x, w); }
};

// Describes a tile: row i of x, and column j of the panel, of which `columns` exist.
struct Tile {
  const ReducedGemm& g;
  int64_t i, j, columns;
};

FASTASR_INLINE Floats finished(const Tile& t, int64_t row, int64_t j, Ints sum) {
  const ReducedWeights& w = t.g.weights;
  const Ints centred = sum - (t.g.zero[row] - kShift) * load_words(w.sum + j);
  return __builtin_convertvector(centred, Floats) * (t.g.step[row] * at(w.scale + j));
}
FASTASR_INLINE Floats finished(const Tile&, int64_t, int64_t, Floats sum) { return sum; }

// Stores a row of the last tile, which lacks columns. Inlined for each row of each tile, this was most of the code.
__attribute__((noinline)) void put_columns(const float* sum, const float* bias, int64_t columns, float* y) {
  for (int64_t c = 0; c < columns; c++) y[c] = bias ? sum[c] + bias[c] : sum[c];
}

// Writes row `row` of y from the sums of the tile's two vectors of columns.
template <typename Sum>
FASTASR_INLINE void finish_row(const Tile& t, int64_t row, Sum left_sum, Sum right_sum) {
  const ReducedGemm& g = t.g;
  Floats left = finished(t, row, t.j, left_sum), right = finished(t, row, t.j + kLanes, right_sum);
  float* const y = g.y + row * g.y_row + t.j;
  if (t.columns == kTileColumns) {
    if (g.bias) left += at(g.bias + t.j), right += at(g.bias + t.j + kLanes);
    put(y, left), put(y + kLanes, right);
  } else {
    alignas(64) float out[kTileColumns];
    put(out, left), put(out + kLanes, right);
    put_columns(out, g.bias ? g.bias + t.j : nullptr, t.columns, y);
  }
}

// Each number of rows has its own function: several tiles inlined into one function would spill.
template <typename T, int64_t kTileRows>
__attribute__((noinline)) void tile(const Tile& t) {
  using F = Format<T>;
  const ReducedGemm& g = t.g;
  const int64_t words = reduced_words(g.k, g.format);
  const int32_t* const x = g.rows + t.i * words;
  const int32_t* w = g.weights.words + t.j / kReducedColumns * kReducedColumns * words + t.j % kReducedColumns;
  typename F::Sum sum[kTileRows][2] = {};
  for (int64_t k = 0; k < words; k++, w += kReducedColumns) {
    const Ints left = load_words(w), right = load_words(w + kLanes);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kTileRows; i++) {
      const Ints v = broadcast(x[i * words + k]);
      sum[i][0] = F::dot(sum[i][0], v, left);
      sum[i][1] = F::dot(sum[i][1], v, right);
    }
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < kTileRows; i++) finish_row(t, t.i + i, sum[i][0], sum[i][1]);
}

template <typename T>
constexpr auto kTiles = []<int64_t... i>(std::integer_sequence<int64_t, i...>) {
  return std::array<void (*)(const Tile&), kRows>{tile<T, i + 1>...};
}(std::make_integer_sequence<int64_t, kRows>());

// Says how many words along k AMX's tiles take; 0 where there are none or they would not gain. The bits of bf16 depend
// on it, so that it looks at k alone.
int64_t tile_step(const ReducedGemm& g) { return kAmx ? amx_step(reduced_words(g.k, g.format)) : 0; }

// A task is some rows by a block of panels, and neighbours share the block. Rows are split evenly: 8 + 7, not 14 + 1.
int64_t row_parts(const ReducedGemm& g) {
  const int64_t most = tile_step(g) ? kAmxMostRows : kRows;
  return (g.m + most - 1) / most;
}
int64_t blocks(const ReducedGemm& g) {
  const int64_t bytes = reduced_panels(g.n) * kReducedColumns * reduced_words(g.k, g.format) * 4;
  const int64_t block = tile_step(g) && g.m >= kManyRows ? kTileBlockBytes : kBlockBytes;
  return std::min(reduced_panels(g.n), (bytes + block - 1) / block);
}
int64_t tasks(const ReducedGemm& g) { return row_parts(g) * blocks(g); }

// Calls run(i, rows, first column, last column) for each task.
template <typename F>
FASTASR_INLINE void each_task(const ReducedGemm& g, int64_t begin, int64_t end, const F& run) {
  const int64_t parts = row_parts(g), panels = reduced_panels(g.n), count = blocks(g);
  for (int64_t task = begin; task < end; task++) {
    const int64_t block = task / parts, part = task % parts, i = g.m * part / parts;
    run(i, g.m * (part + 1) / parts - i, panels * block / count * kReducedColumns,
        std::min(g.n, panels * (block + 1) / count * kReducedColumns));
  }
}

template <typename T>
void tile_products(const ReducedGemm& g, int64_t begin, int64_t end) {
  using Sum = typename Format<T>::Sum;
  const int64_t words = reduced_words(g.k, g.format), step = tile_step(g);
  alignas(64) float sums[kAmxMostRows][kReducedColumns];
  AmxTiles<T> tiles;
  each_task(g, begin, end, [&](int64_t i, int64_t rows, int64_t first, int64_t last) __attribute__((always_inline)) {
    tiles.shape(rows, step);
    const auto finish = [&](int64_t j) __attribute__((always_inline)) {
      const Tile t{g, i, j, std::min(kTileColumns, g.n - j)};
      for (int64_t row = 0; row < rows; row++)
        finish_row(t, i + row, reinterpret_cast<Sum>(load_words(sums[row])),
                   reinterpret_cast<Sum>(load_words(sums[row] + kLanes)));
    };
    // the tiles multiply a panel while the sums of the one before are written
    for (int64_t j = first; j < last; j += kReducedColumns) {
      tiles.multiply(g.rows + i * words, g.weights.words + j * words, words, step);
      if (j > first) finish(j - kReducedColumns);
      tiles.put(sums);
    }
    finish((last - 1) / kReducedColumns * kReducedColumns);
  });
}

template <typename T>
void products(const ReducedGemm& g, int64_t begin, int64_t end) {
  if constexpr (kAmx) {
    if (tile_step(g)) return tile_products<T>(g, begin, end);
  }
  each_task(g, begin, end, [&](int64_t i, int64_t rows, int64_t first, int64_t last) __attribute__((always_inline)) {
    for (int64_t j = first; j < last; j += kTileColumns)
      kTiles<T>[static_cast<size_t>(rows - 1)]({g, i, j, std::min(kTileColumns, g.n - j)});
  });
}

// ---------------------------------------------------------------------------------------------- rows of x
constexpr float kMagic = Bits<float>::magic;

FASTASR_INLINE void int8_row(const float* x, int64_t k, int64_t words, uint8_t* out, float& step, int32_t& zero) {
  constexpr int64_t kChains = 4;
  Floats leasts[kChains] = {}, mosts[kChains] = {}, poisons[kChains] = {};
  int64_t j = 0;
  const auto take = [&](int64_t chain) __attribute__((always_inline)) {
    const Floats v = at(x + j);
    j += kLanes;
    leasts[chain] = smaller(v, leasts[chain]), mosts[chain] = larger(v, mosts[chain]);
    poisons[chain] += v * 0;  // becomes NaN after a NaN or an infinity
  };
  while (j + kChains * kLanes <= k)
#pragma GCC unroll 4
    for (int64_t chain = 0; chain < kChains; chain++) take(chain);
  while (j + kLanes <= k) take(0);
#pragma GCC unroll 4
  for (int64_t chain = 1; chain < kChains; chain++) {
    leasts[0] = smaller(leasts[chain], leasts[0]), mosts[0] = larger(mosts[chain], mosts[0]);
    poisons[0] += poisons[chain];
  }
  float least = across<float>(leasts[0], smaller)[0], most = across<float>(mosts[0], larger)[0];
  float poison = across<float>(poisons[0], [](Floats a, Floats b) { return a + b; })[0];
  for (; j < k; j++) {
    least = x[j] < least ? x[j] : least;
    most = x[j] > most ? x[j] : most;
    poison += x[j] * 0;
  }
  const float range = most - least;
  const bool bad = poison != poison || !(range < std::numeric_limits<float>::infinity());
  step = bad ? std::numeric_limits<float>::quiet_NaN() : std::max(range, 1e-30f) / kLevels;
  std::memset(out + k, 0, static_cast<size_t>(4 * words - k));
  if (bad) {
    zero = 0;
    std::memset(out, 0, static_cast<size_t>(k));
    return;
  }
  const float per_step = 1 / step, origin = std::nearbyint(-least * per_step);
  zero = static_cast<int32_t>(origin);
  // beside the ends of the range the rounded zero leaves half a level; the low bits of the result are the integer
  const Floats all = Floats{} + static_cast<float>(kLevels);
  const auto level = [&](Floats v) __attribute__((always_inline)) {
    return reinterpret_cast<Ints>(smaller(larger(v * per_step + origin, Floats{}), all) + kMagic) & 255;
  };
  for (j = 0; j + kLanes <= k; j += kLanes) {
    typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
    const Bytes bytes = __builtin_convertvector(level(at(x + j)), Bytes);
    std::memcpy(out + j, &bytes, kLanes);
  }
  for (; j < k; j++) out[j] = static_cast<uint8_t>(level(vector_of(x[j]))[0]);
}

FASTASR_INLINE void bf16_row(const float* x, int64_t k, int64_t words, bfloat16* out) {
  for (int64_t j = 0; j < k; j++) store(out + j, x[j]);
  if (k < 2 * words) out[k] = {};
}

template <typename T>
void rows(const ReducedGemm& g, int64_t begin, int64_t end) {
  const int64_t words = reduced_words(g.k, g.format);
  std::vector<float> activated(static_cast<size_t>(g.input == ReducedInput::x ? 0 : g.k));
  for (int64_t i = begin; i < end; i++) {
    const float* x = g.x + i * g.x_row;
    if (g.input != ReducedInput::x) {
      const Swoosh kind = g.input == ReducedInput::swoosh_l ? Swoosh::L : Swoosh::R;
      kernels<SwooshKernels<float>>().forward(x, nullptr, Mask::none, activated.data(), g.k, kind);
      x = activated.data();
    }
    int32_t* const out = g.rows + i * words;
    if constexpr (std::is_same_v<T, int8_t>)
      int8_row(x, g.k, words, reinterpret_cast<uint8_t*>(out), g.step[i], g.zero[i]);
    else
      bf16_row(x, g.k, words, reinterpret_cast<bfloat16*>(out));
  }
}

bool tasks_are_rows(const ReducedGemm& g) { return blocks(g) == 1; }

template <typename T>
void rows_and_products(const ReducedGemm& g, int64_t begin, int64_t end) {
  const int64_t parts = row_parts(g);
  rows<T>(g, g.m * begin / parts, g.m * end / parts);
  products<T>(g, begin, end);
}

double seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Returns the seconds of a run of multiply-adds, `step`, in as many chains as fill the pipes. Each chain starts from a
// volatile of its own: of equal chains a compiler keeps one, and its time is the latency of its steps.
template <typename F>
double timed(const F& step) {
  volatile float ends[16] = {};
  const double begin = seconds();
  Floats sum[16];
  for (int chain = 0; chain < 16; chain++) sum[chain] = Floats{} + ends[chain];
  for (int i = 0; i < 256; i++)
#pragma GCC unroll 16
    for (Floats& s : sum) s = step(s);
  for (int chain = 0; chain < 16; chain++) ends[chain] = sum[chain][0];
  return seconds() - begin;
}

// bfloat16 has two products in a word. Intel processors of family 6, model 207 have the instruction at a quarter of the
// rate of float32's: float32 is then twice as fast.
template <typename T>
bool gains() {
  if constexpr (std::is_same_v<T, int8_t> || kAmx) return true;
  if constexpr (!kBf16Instruction) return false;
  static const bool faster = [] {
    volatile float one = 1;
    const Floats x = Floats{} + one;
    const Ints words = reinterpret_cast<Ints>(x);
    double least_bf16 = 1, least_float = 1;
    // Of several runs the shortest counts, since another process may take the core. Every second round has the other
    // order: the first vector instructions of a program run at a lower clock on some processors.
    for (int round = 0; round < 20; round++) {
      const auto bf16 = [&](Floats s) __attribute__((always_inline)) { return add_bf16(s, words, words); };
      if (round % 2 == 0) least_bf16 = std::min(least_bf16, timed(bf16));
      least_float = std::min(least_float, timed([&](Floats s) __attribute__((always_inline)) { return x + s * x; }));
      if (round % 2 == 1) least_bf16 = std::min(least_bf16, timed(bf16));
    }
    return 1.1 * least_bf16 < 2 * least_float;
  }();
  return faster;
}

}  // namespace

FASTASR_TABLE(ReducedGemmTable, .kernels = {.levels = kLevels,
                                            .gains = gains<T>,
                                            .rows = rows<T>,
                                            .tasks = tasks,
                                            .products = products<T>,
                                            .tasks_are_rows = tasks_are_rows,
                                            .rows_and_products = rows_and_products<T>})
FASTASR_PROVIDE(ReducedGemmTable, int8_t)
FASTASR_PROVIDE(ReducedGemmTable, bfloat16)

}  // namespace fastasr::cpu
