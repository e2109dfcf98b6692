// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstring>

#include "cpu/math/number.h"
#include "cuda/platform.cuh"

// Storage types on the device. Kernels are compiled per type of computation (float or double); the storage type is an
// argument, the same for a whole launch, so that three storage types share one kernel. A value waits in a register
// as it was loaded: converting at once would wait for the memory.
namespace fastasr::cuda {

enum StorageType { kFloat = 0, kBfloat16 = 1, kHalf = 2, kDouble = 3 };

template <int type>
constexpr int64_t kBytesOf = type == kDouble  ? 8
                             : type == kFloat ? 4
                                              : 2;
FASTASR_HD int64_t bytes_of(int type) { return type == kDouble ? 8 : type == kFloat ? 4 : 2; }

template <typename To, typename From>
FASTASR_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename C>
struct Storage;

template <>
struct Storage<float> {
  using Raw = uint32_t;
  static constexpr StorageType kOwn = kFloat;

  template <int type>
  FASTASR_HD static Raw load(const void* p) {
    return type == kFloat ? *static_cast<const uint32_t*>(p) : *static_cast<const uint16_t*>(p);
  }
  template <int type>
  FASTASR_HD static float widen(Raw r) {
    if (type == kFloat) return bit_cast<float>(r);
    if (type == kBfloat16) return bit_cast<float>(r << 16);
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(static_cast<unsigned short>(r)));
#else
    return cpu::load(cpu::float16{static_cast<uint16_t>(r)});
#endif
  }
  template <int type>
  FASTASR_HD static void store(void* p, float v) {
#ifdef __CUDA_ARCH__
    if (type == kBfloat16) *static_cast<__nv_bfloat16*>(p) = __float2bfloat16_rn(v);
    if (type == kHalf) *static_cast<__half*>(p) = __float2half_rn(v);
#else
    if (type == kBfloat16) cpu::store(static_cast<cpu::bfloat16*>(p), v);
    if (type == kHalf) cpu::store(static_cast<cpu::float16*>(p), v);
#endif
    if (type == kFloat) *static_cast<float*>(p) = v;
  }
};

// Double holds the narrower types too: see Pass in ema_scan.cuh.
template <>
struct Storage<double> {
  using Raw = uint64_t;
  static constexpr StorageType kOwn = kDouble;

  template <int type>
  FASTASR_HD static Raw load(const void* p) {
    if (type == kDouble) return *static_cast<const uint64_t*>(p);
    return Storage<float>::load<type>(p);
  }
  template <int type>
  FASTASR_HD static double widen(Raw r) {
    if (type == kDouble) return bit_cast<double>(r);
    return static_cast<double>(Storage<float>::widen<type>(static_cast<uint32_t>(r)));
  }
  template <int type>
  FASTASR_HD static void store(void* p, double v) {
    if (type == kDouble)
      *static_cast<double*>(p) = v;
    else
      Storage<float>::store<type>(p, static_cast<float>(v));
  }
};

template <int n>
struct Constant {
  static constexpr int value = n;
};

// Calls f(Constant<type>) for the storage types of C.
template <typename C, typename F>
FASTASR_HD void with_storage_type(int type, const F& f) {
  if (type == Storage<C>::kOwn)
    f(Constant<Storage<C>::kOwn>{});
  else if (Storage<C>::kOwn == kDouble && type == kFloat)
    f(Constant<kFloat>{});
  else if (type == kBfloat16)
    f(Constant<kBfloat16>{});
  else
    f(Constant<kHalf>{});
}

// Returns element i, where the type is not worth a branch of its own.
template <typename C>
FASTASR_HD C load_one(int type, const void* p, int64_t i) {
  C v = C(0);
  with_storage_type<C>(type, [&](auto t) {
    constexpr int kType = decltype(t)::value;
    const char* const at = static_cast<const char*>(p) + i * kBytesOf<kType>;
    v = Storage<C>::template widen<kType>(Storage<C>::template load<kType>(at));
  });
  return v;
}
template <typename C>
FASTASR_HD void store_one(int type, void* p, int64_t i, C v) {
  with_storage_type<C>(type, [&](auto t) {
    constexpr int kType = decltype(t)::value;
    Storage<C>::template store<kType>(static_cast<char*>(p) + i * kBytesOf<kType>, v);
  });
}

}  // namespace fastasr::cuda
