// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/swoosh.h"

#include "cpu/math/elementary.h"
#include "cpu/simd/softplus_avx512.simd.h"

namespace fastasr::cpu {
namespace {

template <typename C>
struct Constants {
  C shift, offset;
};

template <typename C>
FASTASR_INLINE Constants<C> constants(Swoosh kind) {
  return kind == Swoosh::L ? Constants<C>{C(4), C(0.035)} : Constants<C>{C(1), C(0.313261687)};
}

// log(1 + e^z) = max(z, 0) + log1p(e^-|z|) cannot overflow; a NaN survives in the term -0.08 x. Near x = 0 the offset
// cancels the logarithm: it is subtracted first, which is exact there.
template <typename C>
FASTASR_INLINE C swoosh(C x, C u, C z, C offset) {
  return (log1p_unit(u) - offset) + ((z > 0 ? z : C(0)) - C(0.08) * x);
}

template <typename C>
FASTASR_INLINE C derivative(C u, C z) {
  return (z > 0 ? C(1) : u) / (C(1) + u) - C(0.08);
}

#ifdef __AVX512F__
template <typename T, Mask kMask>
FASTASR_INLINE void forward16(const FASTASR_SIMD::Registers& table, const T* x, const T* mask, T* y, __mmask16 lanes,
                              __m512 scalar, const Constants<float>& k) {
  __m512 out = FASTASR_SIMD::swoosh(table, FASTASR_SIMD::load16(x, lanes), k.shift, k.offset);
  if (kMask == Mask::scalar) out = _mm512_mul_ps(out, scalar);
  if (kMask == Mask::elementwise) out = _mm512_mul_ps(out, FASTASR_SIMD::load16(mask, lanes));
  FASTASR_SIMD::store16(y, lanes, out);
}
#endif

// y may be the same memory as x. Each (type, mask, output) has its own function: several bodies in one function would
// spill.
template <typename T, Mask kMask>
__attribute__((noinline)) void forward(const T* x, const T* __restrict mask, T* y, int64_t n, Swoosh kind) {
  using C = compute_t<T>;
  const Constants<C> k = constants<C>(kind);
  const C scalar = kMask == Mask::scalar ? load(mask[0]) : C(1);
#ifdef __AVX512F__
  if constexpr (sizeof(C) == 4) {
    const FASTASR_SIMD::Registers table = FASTASR_SIMD::load_table();
    const __m512 scalars = _mm512_set1_ps(scalar);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)  // a constant mask: the compiler drops it
      forward16<T, kMask>(table, x + i, kMask == Mask::elementwise ? mask + i : mask, y + i, 0xffff, scalars, k);
    if (i < n)
      forward16<T, kMask>(table, x + i, kMask == Mask::elementwise ? mask + i : mask, y + i, FASTASR_SIMD::lanes(n - i),
                          scalars, k);
    return;
  }
#endif
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const C v = load(x[i]), z = v - k.shift;
    C out = swoosh(v, exp_nonpositive(-std::fabs(z)), z, k.offset);
    if (kMask == Mask::scalar) out *= scalar;
    if (kMask == Mask::elementwise) out *= load(mask[i]);
    store(&y[i], out);
  }
}

// dx may be the same memory as grad: each element is read before it is written.
template <typename T, Mask kMask, bool kOutput>
__attribute__((noinline)) void backward(const T* grad, const T* __restrict x, const T* __restrict mask, T* dx,
                                        T* __restrict y, int64_t n, Swoosh kind) {
  using C = compute_t<T>;
  const Constants<C> k = constants<C>(kind);
  const C scalar = kMask == Mask::scalar ? load(mask[0]) : C(1);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const C v = load(x[i]), z = v - k.shift;
    const C u = exp_nonpositive(-std::fabs(z));
    C d = derivative(u, z);
    C out = kOutput ? swoosh(v, u, z, k.offset) : C(0);
    const C m = kMask == Mask::elementwise ? load(mask[i]) : scalar;
    if (kMask != Mask::none) {
      d *= m;
      out *= m;
    }
    store(&dx[i], load(grad[i]) * d);
    if (kOutput) store(&y[i], out);
  }
}

template <typename T>
void forward(const T* x, const T* mask, Mask mask_kind, T* y, int64_t n, Swoosh kind) {
  constexpr decltype(&forward<T, Mask::none>) by_mask[] = {forward<T, Mask::none>, forward<T, Mask::scalar>,
                                                           forward<T, Mask::elementwise>};
  by_mask[static_cast<int>(mask_kind)](x, mask, y, n, kind);
}

template <typename T>
void backward(const T* grad, const T* x, const T* mask, Mask mask_kind, T* dx, T* y, int64_t n, Swoosh kind) {
  constexpr decltype(&backward<T, Mask::none, false>) by_mask[][2] = {
      {backward<T, Mask::none, false>, backward<T, Mask::none, true>},
      {backward<T, Mask::scalar, false>, backward<T, Mask::scalar, true>},
      {backward<T, Mask::elementwise, false>, backward<T, Mask::elementwise, true>}};
  by_mask[static_cast<int>(mask_kind)][y != nullptr](grad, x, mask, dx, y, n, kind);
}

}  // namespace

FASTASR_KERNELS(SwooshKernels, .forward = forward<T>, .backward = backward<T>)

}  // namespace fastasr::cpu
