// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/math/number.h"
#include "cpu/simd/simd.h"

// How a kernel reaches its callers. CMake compiles a file *.simd.cpp once per instruction set, with that set's flags
// and FASTASR_SIMD defined as its name. What the file itself defines lies in an unnamed namespace, what headers
// *.simd.h define in `inline namespace FASTASR_SIMD`; all that leaves the object is a table of functions, a constant:
//
//   bypass.h         template <typename T> struct BypassKernels { void (*forward)(...); void (*backward)(...); };
//   bypass.simd.cpp  FASTASR_KERNELS(BypassKernels, .forward = forward<T>, .backward = backward<T>)
//   a caller         kernels<BypassKernels<T>>().forward(...)
//
// A caller gets the table of the machine's instruction set; a caller that is a *.simd.cpp itself that of its own, at no
// cost. FASTASR_SETS: what the library is built for, in ascending order. Tables of a plain *.cpp, compiled once, have a
// member `static constexpr bool kCompiledOnce = true`.
namespace fastasr::cpu {

// The table of one instruction set. Each object defines its own.
template <typename Table, Simd set>
struct Provided {
  static const Table table;
};

// double serves references and gradient checks, so it has no set of its own beyond AVX2.
template <typename Table>
constexpr bool kDouble = false;
template <template <typename> typename Kernels>
constexpr bool kDouble<Kernels<double>> = true;

// What adds dot products of short numbers is compiled for the sets that have instructions for it, too. The set is then
// picked at run time, by a caller compiled for avx512 as well.
template <typename Table>
constexpr bool kDots = requires { Table::kDotProducts; };

#if defined(__clang__)
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wundefined-var-template"
#endif
template <typename Table, Simd least, Simd... wider>
FASTASR_INLINE const Table& pick([[maybe_unused]] Simd set) {
  constexpr bool last = (kDouble<Table> && least >= Simd::avx2) || (!kDots<Table> && least >= Simd::avx512);
  if constexpr (sizeof...(wider) > 0 && !last) {
    if (set > least) return pick<Table, wider...>(set);
  }
  return Provided<Table, least>::table;
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
// FASTASR_KERNELS_FLOAT for a table that is no template.
#define FASTASR_KERNELS(TABLE, ...)           \
  FASTASR_KERNELS_COMPUTE(TABLE, __VA_ARGS__) \
  FASTASR_PROVIDE(TABLE, bfloat16)            \
  FASTASR_PROVIDE(TABLE, float16)

#define FASTASR_KERNELS_COMPUTE(TABLE, ...)    \
  namespace {                                  \
  template <typename T>                        \
  constexpr TABLE<T> k##TABLE = {__VA_ARGS__}; \
  }                                            \
  FASTASR_PROVIDE(TABLE, float)                \
  FASTASR_PROVIDE_DOUBLE(TABLE)

#define FASTASR_KERNELS_FLOAT(TABLE, ...) \
  template <>                             \
  constinit const TABLE Provided<TABLE, Simd::FASTASR_OBJECT_SET>::table = {__VA_ARGS__};

#define FASTASR_PROVIDE(TABLE, T) \
  template <>                     \
  constinit const TABLE<T> Provided<TABLE<T>, Simd::FASTASR_OBJECT_SET>::table = k##TABLE<T>;
#ifdef FASTASR_WITHOUT_DOUBLE
#define FASTASR_PROVIDE_DOUBLE(TABLE)
#else
#define FASTASR_PROVIDE_DOUBLE(TABLE) FASTASR_PROVIDE(TABLE, double)
#endif
