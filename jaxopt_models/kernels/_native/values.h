// Numbers as they are stored, and inputs picked by an index.
#ifndef JOM_VALUES_H_
#define JOM_VALUES_H_

#include "signs.h"

namespace jom {

enum class Kind : int { kFloat, kBf16, kInt8 };

// Lanes from `at` on; those beyond n are zero.
template <Kind kind>
JOM_INLINE Floats value(const void* p, int64_t at, int n) {
  if constexpr (kind != Kind::kInt8) {
#if JOM_AVX512
    if constexpr (kind == Kind::kBf16) {
      if (n == kLanes) {
        const void* from = static_cast<const uint16_t*>(p) + at;
        __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
      }
    }
#endif
    return load_as(p, at, kind == Kind::kBf16, n);
  } else {
    const int8_t* from = static_cast<const int8_t*>(p) + at;
#if JOM_AVX512
    if (n == kLanes) {
      return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)))};
    }
#elif JOM_AVX2
    if (n == kLanes) {
      __m128i low = _mm_loadl_epi64((const __m128i*)from);
      __m128i high = _mm_loadl_epi64((const __m128i*)(from + 8));
      return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low)),
              _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high))};
    }
#endif
    float all[kLanes] = {};
    for (int i = 0; i < n; i++) all[i] = from[i];
    return load(all);
  }
}

// Runs of `unit` neighbours of x, 16 numbers in all; the i-th starts at unit * index[i].
template <int unit>
JOM_INLINE Floats picked(const float* x, const uint16_t* index) {
  if constexpr (unit == kLanes) {
    return load(x + (int64_t)index[0] * kLanes);
  } else if constexpr (unit == 8) {
    const float *a = x + 8 * (int64_t)index[0], *b = x + 8 * (int64_t)index[1];
#if JOM_AVX512
    return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(a)), _mm256_loadu_ps(b), 1)};
#elif JOM_AVX2
    return {_mm256_loadu_ps(a), _mm256_loadu_ps(b)};
#else
    Floats r;
    std::memcpy(&r, a, 32);
    std::memcpy(reinterpret_cast<char*>(&r) + 32, b, 32);
    return r;
#endif
  } else {
    static_assert(unit == 4);
    auto at = [&](int i) { return x + 4 * (int64_t)index[i]; };
#if JOM_AVX512 || JOM_AVX2
    auto half = [&](int i) __attribute__((always_inline)) {
      __m256 low = _mm256_castps128_ps256(_mm_loadu_ps(at(i)));
      return _mm256_insertf128_ps(low, _mm_loadu_ps(at(i + 1)), 1);
    };
#endif
#if JOM_AVX512
    return {_mm512_insertf32x8(_mm512_castps256_ps512(half(0)), half(2), 1)};
#elif JOM_AVX2
    return {half(0), half(2)};
#else
    Floats r;
    for (int i = 0; i < 4; i++) std::memcpy(reinterpret_cast<char*>(&r) + 16 * i, at(i), 16);
    return r;
#endif
  }
}

// For each lane one of four numbers, by the two lowest bits of `which`; these are then shifted out.
struct Places {
#if JOM_AVX512
  __m512i v;
  JOM_INLINE explicit Places(const uint32_t* p) : v(_mm512_loadu_si512(p)) {}
  JOM_INLINE Floats of(const float* four) const {
    return {_mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(four)), v)};
  }
  JOM_INLINE void next() { v = _mm512_srli_epi32(v, 2); }
#elif JOM_AVX2
  __m256i lo, hi;
  JOM_INLINE explicit Places(const uint32_t* p)
      : lo(_mm256_loadu_si256((const __m256i*)p)), hi(_mm256_loadu_si256((const __m256i*)(p + 8))) {}
  JOM_INLINE Floats of(const float* four) const {
    __m256 x = _mm256_broadcast_ps((const __m128*)four);
    return {_mm256_permutevar_ps(x, lo), _mm256_permutevar_ps(x, hi)};
  }
  JOM_INLINE void next() { lo = _mm256_srli_epi32(lo, 2), hi = _mm256_srli_epi32(hi, 2); }
#else
  uint32_t v[kLanes];
  JOM_INLINE explicit Places(const uint32_t* p) { std::memcpy(v, p, sizeof v); }
  JOM_INLINE Floats of(const float* four) const {
    float all[kLanes];
    for (int i = 0; i < kLanes; i++) all[i] = four[v[i] & 3];
    return load(all);
  }
  JOM_INLINE void next() {
    for (int i = 0; i < kLanes; i++) v[i] >>= 2;
  }
#endif
};

}  // namespace jom

#endif  // JOM_VALUES_H_
