// Vectors of 16 numbers, the same on every processor.
//
// Kernels are written once against these and compiled once for each instruction set, chosen by the
// flags of the compiler. Integer operations give the same bits everywhere; floating ones, too, as
// none is contracted to a fused multiply-add (-ffp-contract=off).
#ifndef JOM_ISA_H_
#define JOM_ISA_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512VNNI__)
#define JOM_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__)
#define JOM_AVX2 1
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)
#define JOM_NEON 1
#include <arm_neon.h>
#else
#define JOM_PORTABLE 1
#endif

#define JOM_INLINE inline __attribute__((always_inline))
// Before a loop over the parts of a tile, which has to go for these to stay in registers.
#if JOM_PORTABLE
#define JOM_UNROLL
#elif defined(__clang__)
#define JOM_UNROLL _Pragma("unroll")
#else
#define JOM_UNROLL _Pragma("GCC unroll 16")
#endif

namespace jom {

#if JOM_AVX512
inline constexpr char kIsa[] = "avx512";
#elif JOM_AVX2
inline constexpr char kIsa[] = "avx2";
#elif JOM_NEON
inline constexpr char kIsa[] = "neon";
#else
inline constexpr char kIsa[] = "portable";
#endif

inline constexpr int kLanes = 16;

// ------------------------------------------------------------------ the three kinds of vectors
// Bytes: 64 unsigned bytes, four for each lane. Ints, Floats: 16 lanes of 32 bits.

#if JOM_AVX512
#include "isa_avx512.h"
#elif JOM_AVX2
#include "isa_avx2.h"
#elif JOM_NEON
#include "isa_neon.h"
#else
#include "isa_portable.h"
#endif

#if !JOM_AVX512
JOM_INLINE Floats load(const float* p, int n) {
  float all[kLanes] = {};
  std::memcpy(all, p, n * sizeof(float));
  return load(all);
}
JOM_INLINE void store(float* p, Floats a, int n) {
  float all[kLanes];
  store(all, a);
  std::memcpy(p, all, n * sizeof(float));
}
#endif

// ------------------------------------------------------------------ bfloat16

JOM_INLINE float from_bf16(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
// To the nearest, ties to even; a NaN stays one.
JOM_INLINE uint16_t to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits >> 16) | 64);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace jom

#endif  // JOM_ISA_H_
