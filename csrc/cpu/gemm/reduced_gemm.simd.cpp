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

#include "cpu/gemm/words.simd.h"

namespace fastasr::cpu {
namespace {

constexpr int kLanes = Lanes<float>::count;

// Two vectors of columns make a tile; its sums take the registers that weights, a broadcast and, without an instruction
// for the whole, halves of sums leave.
constexpr int64_t kTileColumns = 2 * kLanes;
constexpr int64_t kPanelTiles = kReducedColumns / kTileColumns;
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

constexpr int64_t kBlockBytes = int64_t{1} << 18;  // weights that several rows share while they are in a cache

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
  for (int64_t i = 0; i < kTileRows; i++) {
    alignas(64) float out[kTileColumns];
    Floats left = finished(t, t.i + i, t.j, sum[i][0]), right = finished(t, t.i + i, t.j + kLanes, sum[i][1]);
    float* const y = g.y + (t.i + i) * g.y_row + t.j;
    if (t.columns == kTileColumns) {
      if (g.bias) left += at(g.bias + t.j), right += at(g.bias + t.j + kLanes);
      put(y, left), put(y + kLanes, right);
    } else {
      put(out, left), put(out + kLanes, right);
      put_columns(out, g.bias ? g.bias + t.j : nullptr, t.columns, y);
    }
  }
}

template <typename T>
constexpr auto kTiles = []<int64_t... i>(std::integer_sequence<int64_t, i...>) {
  return std::array<void (*)(const Tile&), kRows>{tile<T, i + 1>...};
}(std::make_integer_sequence<int64_t, kRows>());

// A task is some rows by a block of panels, and neighbours share the block. Rows are split evenly: 8 + 7, not 14 + 1.
int64_t row_parts(const ReducedGemm& g) { return (g.m + kRows - 1) / kRows; }
int64_t blocks(const ReducedGemm& g) {
  const int64_t bytes = reduced_panels(g.n) * kReducedColumns * reduced_words(g.k, g.format) * 4;
  return std::min(reduced_panels(g.n), (bytes + kBlockBytes - 1) / kBlockBytes);
}
int64_t tasks(const ReducedGemm& g) { return row_parts(g) * blocks(g); }

template <typename T>
void products(const ReducedGemm& g, int64_t begin, int64_t end) {
  const int64_t parts = row_parts(g), panels = reduced_panels(g.n), count = blocks(g);
  for (int64_t task = begin; task < end; task++) {
    const int64_t block = task / parts, part = task % parts;
    const int64_t i = g.m * part / parts, rows = g.m * (part + 1) / parts - i;
    const int64_t last = std::min(g.n, panels * (block + 1) / count * kReducedColumns);
    for (int64_t j = panels * block / count * kReducedColumns; j < last; j += kTileColumns)
      kTiles<T>[static_cast<size_t>(rows - 1)]({g, i, j, std::min(kTileColumns, g.n - j)});
  }
}

// ---------------------------------------------------------------------------------------------- rows of x
constexpr float kMagic = Bits<float>::magic;

FASTASR_INLINE void int8_row(const float* x, int64_t k, int64_t words, uint8_t* out, float& step, int32_t& zero) {
  float least = 0, most = 0, poison = 0;  // a NaN or an infinity makes NaN of it
#pragma omp simd reduction(min : least) reduction(max : most) reduction(+ : poison)
  for (int64_t j = 0; j < k; j++) {
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
  const auto level = [&](auto v, auto none, auto all) __attribute__((always_inline)) {
    const auto p = v * per_step + origin, some = p > none ? p : none;
    return (some < all ? some : all) + kMagic;
  };
  const Floats none{}, all = none + static_cast<float>(kLevels);
  int64_t j = 0;
  for (; j + kLanes <= k; j += kLanes) {
    typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
    const Ints low_bits = reinterpret_cast<Ints>(level(at(x + j), none, all)) & 255;
    const Bytes bytes = __builtin_convertvector(low_bits, Bytes);
    std::memcpy(out + j, &bytes, kLanes);
  }
  for (; j < k; j++) out[j] = static_cast<uint8_t>(to_bits(level(x[j], 0.0f, static_cast<float>(kLevels))));
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

// Returns the seconds of a run of multiply-adds, `step`, in as many chains as fill the pipes; of several runs the
// fastest, since another process may take the core.
template <typename F>
double fastest(const F& step) {
  double best = 1;
  for (int run = 0; run < 9; run++) {
    Floats sum[16] = {};
    const double begin = seconds();
    for (int i = 0; i < 256; i++)
#pragma GCC unroll 16
      for (Floats& s : sum) s = step(s);
    best = std::min(best, seconds() - begin);
    for (const Floats& s : sum) [[maybe_unused]]
      volatile float used = s[0];
  }
  return best;
}

// bfloat16 has two products in a word. Intel processors of family 6, model 207 have the instruction at a quarter of the
// rate of float32's: float32 is then twice as fast.
template <typename T>
bool gains() {
  if constexpr (std::is_same_v<T, int8_t> || !kBf16Instruction) return std::is_same_v<T, int8_t>;
  static const bool faster = [] {
    volatile float one = 1;
    const Floats x = Floats{} + one;
    const Ints words = reinterpret_cast<Ints>(x);
    return 1.1 * fastest([&](Floats s) __attribute__((always_inline)) { return add_bf16(s, words, words); }) <
           2 * fastest([&](Floats s) __attribute__((always_inline)) { return s + x * x; });
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
