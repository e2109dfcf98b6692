// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <type_traits>

#include "cpu/math/number.h"
#include "cpu/simd/simd.h"

// How a kernel reaches its callers. CMake compiles a file *.simd.cpp once per instruction set, with that set's flags
// and FASTASR_SIMD defined as its name. What the file itself defines lies in an unnamed namespace, what headers
// *.simd.h define in `inline namespace FASTASR_SIMD`; the object exports nothing but a table of functions, a constant:
//
//   bypass.h         template <typename T> struct BypassKernels { void (*forward)(...); void (*backward)(...); };
//   bypass.simd.cpp  FASTASR_KERNELS(BypassKernels, .forward = forward<T>, .backward = backward<T>)
//   a caller         kernels<BypassKernels<T>>().forward(...)
//
// A caller gets the table of the machine's instruction set; a caller that is a *.simd.cpp gets the table of its own
// set, at no cost. FASTASR_SETS lists the sets of the library, in ascending order. Tables of a plain *.cpp, compiled
// once, have a member `static constexpr bool kCompiledOnce = true`.
namespace fastasr::cpu {

// The table of one instruction set. Each object defines its own.
template <typename Table, Simd set>
struct Provided {
  static const Table table;
};

// Kernels that add dot products of short numbers also have tables of the sets with instructions for them. The set is
// picked at run time, even by a caller compiled for avx512.
template <typename Table>
constexpr bool kDots = requires { Table::kDotProducts; };

// The type that a table is for.
template <typename Table>
struct TypeOf {
  using Type = void;
};
template <template <typename> typename Kernels, typename T>
struct TypeOf<Kernels<T>> {
  using Type = T;
};

// Says whether a set has a table of its own. The least set of the library has all tables.
template <typename Table>
constexpr bool own(Simd set) {
  using enum Simd;
  using T = typename TypeOf<Table>::Type;
  constexpr Simd sets[] = {FASTASR_SETS};
  if (set == sets[0]) return true;
  if (set == avx512 && std::is_same_v<T, double>) return false;  // avx2 suffices for references and gradient checks
  if (set <= avx512 || set == neon) return true;
  const bool int8 = set == avx512_vnni || set == avx512_amx || set == neon_dot || set == neon_bf16;
  const bool bf16 = set == avx512_bf16 || set == avx512_amx || set == neon_bf16;
  return kDots<Table> && ((int8 && std::is_same_v<T, int8_t>) || (bf16 && std::is_same_v<T, bfloat16>));
}

#if defined(__clang__)
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wundefined-var-template"
#endif
template <typename Table, Simd best>
FASTASR_INLINE const Table& pick(Simd) {
  return Provided<Table, best>::table;
}
template <typename Table, Simd best, Simd next, Simd... wider>
FASTASR_INLINE const Table& pick(Simd set) {
  if constexpr (own<Table>(next)) {
    if (set >= next) return pick<Table, next, wider...>(set);
  }
  return pick<Table, best, wider...>(set);
}
#if defined(__clang__)
#pragma clang diagnostic pop
#endif

template <typename Table>
FASTASR_INLINE const Table& kernels() {
  using enum Simd;
  if constexpr (requires { Table::kCompiledOnce; }) return pick<Table, portable>(portable);
#ifdef FASTASR_SIMD
  if constexpr (!kDots<Table>) return pick<Table, FASTASR_SETS>(FASTASR_SIMD);
#endif
  return pick<Table, FASTASR_SETS>(simd());
}

}  // namespace fastasr::cpu

#ifdef FASTASR_SIMD
#define FASTASR_OBJECT_SET FASTASR_SIMD
#else
#define FASTASR_OBJECT_SET portable
#endif

// A *.simd.cpp ends with one of these, in namespace fastasr::cpu. They define the object's tables from functions of a
// storage type T: FASTASR_KERNELS for all four types, FASTASR_KERNELS_COMPUTE for float and double,
// FASTASR_KERNELS_FLOAT for a table that is no template. For other types: FASTASR_TABLE, then FASTASR_PROVIDE for each.
#define FASTASR_KERNELS(TABLE, ...)           \
  FASTASR_KERNELS_COMPUTE(TABLE, __VA_ARGS__) \
  FASTASR_PROVIDE(TABLE, bfloat16)            \
  FASTASR_PROVIDE(TABLE, float16)

#define FASTASR_KERNELS_COMPUTE(TABLE, ...) \
  FASTASR_TABLE(TABLE, __VA_ARGS__)         \
  FASTASR_PROVIDE(TABLE, float)             \
  FASTASR_PROVIDE(TABLE, double)

#define FASTASR_TABLE(TABLE, ...)              \
  namespace {                                  \
  template <typename T>                        \
  constexpr TABLE<T> k##TABLE = {__VA_ARGS__}; \
  }

#define FASTASR_KERNELS_FLOAT(TABLE, ...) \
  template <>                             \
  constinit const TABLE Provided<TABLE, Simd::FASTASR_OBJECT_SET>::table = {__VA_ARGS__};

// An object whose set has no such table of its own holds an empty one that nobody picks.
#define FASTASR_PROVIDE(TABLE, T)                                                                   \
  template <>                                                                                       \
  constinit const TABLE<T> Provided<TABLE<T>, Simd::FASTASR_OBJECT_SET>::table = []<typename U>() { \
    if constexpr (own<TABLE<U>>(Simd::FASTASR_OBJECT_SET)) return k##TABLE<U>;                      \
    return TABLE<U>{};                                                                              \
  }.template operator()<T>();
