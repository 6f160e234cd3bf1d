// Signs as bits, 32 to a word, and in how many of them two words differ.
#ifndef JOM_SIGNS_H_
#define JOM_SIGNS_H_

#include "isa.h"

namespace jom {

inline constexpr int kWord = 32;  // signs of a word: a lane holds one

// A tally counts, for each lane, the bits in which words differ: `apart` adds a word, of each lane
// its own and one for all, and after at most kTally of them `total` says the sums.

#if JOM_AVX512

JOM_INLINE Ints plus(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
// Bit i is set where lane i is not negative; a NaN is.
JOM_INLINE uint32_t signs(Floats x) {
  return _mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_GE_OQ);
}
JOM_INLINE Floats magnitude(Floats x) { return {_mm512_abs_ps(x.v)}; }

#if defined(__AVX512VPOPCNTDQ__)
#define JOM_POPCOUNT 1
struct Tally { __m512i v; };
inline constexpr int kTally = 1 << 25;
JOM_INLINE Tally apart(Tally t, Bytes w, uint32_t x) {
  __m512i d = _mm512_xor_si512(w.v, _mm512_set1_epi32((int)x));
  return {_mm512_add_epi32(t.v, _mm512_popcnt_epi32(d))};
}
JOM_INLINE Ints total(Tally t) { return {t.v}; }
#else
// Bytes count up to 8 for each word.
struct Tally { __m512i v; };
inline constexpr int kTally = 31;
JOM_INLINE Tally apart(Tally t, Bytes w, uint32_t x) {
  const __m512i low = _mm512_set1_epi8(15);
  const __m512i table = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  __m512i d = _mm512_xor_si512(w.v, _mm512_set1_epi32((int)x));
  __m512i a = _mm512_shuffle_epi8(table, _mm512_and_si512(d, low));
  __m512i b = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(d, 4), low));
  return {_mm512_add_epi8(t.v, _mm512_add_epi8(a, b))};
}
JOM_INLINE Ints total(Tally t) {
  __m512i pairs = _mm512_maddubs_epi16(t.v, _mm512_set1_epi8(1));
  return {_mm512_madd_epi16(pairs, _mm512_set1_epi16(1))};
}
#endif

#elif JOM_AVX2

JOM_INLINE Ints plus(Ints a, Ints b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
JOM_INLINE uint32_t signs(Floats x) {
  auto half = [](__m256 v) {
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_GE_OQ));
  };
  return half(x.lo) | half(x.hi) << 8;
}
JOM_INLINE Floats magnitude(Floats x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.lo), _mm256_andnot_ps(sign, x.hi)};
}

struct Tally { __m256i lo, hi; };
inline constexpr int kTally = 31;
JOM_INLINE Tally apart(Tally t, Bytes w, uint32_t x) {
  const __m256i low = _mm256_set1_epi8(15), all = _mm256_set1_epi32((int)x);
  const __m256i table = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  auto half = [&](__m256i t, __m256i w) __attribute__((always_inline)) {
    __m256i d = _mm256_xor_si256(w, all);
    __m256i a = _mm256_shuffle_epi8(table, _mm256_and_si256(d, low));
    __m256i b = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(d, 4), low));
    return _mm256_add_epi8(t, _mm256_add_epi8(a, b));
  };
  return {half(t.lo, w.lo), half(t.hi, w.hi)};
}
JOM_INLINE Ints total(Tally t) {
  auto half = [](__m256i v) {
    __m256i pairs = _mm256_maddubs_epi16(v, _mm256_set1_epi8(1));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  };
  return {half(t.lo), half(t.hi)};
}

#elif JOM_NEON

JOM_INLINE Ints plus(Ints a, Ints b) {
  Ints r;
  for (int i = 0; i < 4; i++) r.v[i] = vaddq_s32(a.v[i], b.v[i]);
  return r;
}
JOM_INLINE uint32_t signs(Floats x) {
  const int32x4_t place = {0, 1, 2, 3};
  uint32_t r = 0;
  for (int i = 0; i < 4; i++) {
    uint32x4_t bit = vshrq_n_u32(vcgeq_f32(x.v[i], vdupq_n_f32(0.0f)), 31);
    r |= vaddvq_u32(vshlq_u32(bit, place)) << (4 * i);
  }
  return r;
}
JOM_INLINE Floats magnitude(Floats x) {
  Floats r;
  for (int i = 0; i < 4; i++) r.v[i] = vabsq_f32(x.v[i]);
  return r;
}

struct Tally { uint8x16_t v[4]; };
inline constexpr int kTally = 31;
JOM_INLINE Tally apart(Tally t, Bytes w, uint32_t x) {
  const uint8x16_t all = vreinterpretq_u8_u32(vdupq_n_u32(x));
  Tally r;
  for (int i = 0; i < 4; i++) r.v[i] = vaddq_u8(t.v[i], vcntq_u8(veorq_u8(w.v[i], all)));
  return r;
}
JOM_INLINE Ints total(Tally t) {
  Ints r;
  for (int i = 0; i < 4; i++) r.v[i] = vreinterpretq_s32_u32(vpaddlq_u16(vpaddlq_u8(t.v[i])));
  return r;
}

#else

JOM_INLINE Ints plus(Ints a, Ints b) {
  Ints r;
  for (int i = 0; i < kLanes; i++) r.v[i] = a.v[i] + b.v[i];
  return r;
}
JOM_INLINE uint32_t signs(Floats x) {
  uint32_t r = 0;
  for (int i = 0; i < kLanes; i++) r |= (uint32_t)(x.v[i] >= 0.0f) << i;
  return r;
}
JOM_INLINE Floats magnitude(Floats x) {
  Floats r;
  for (int i = 0; i < kLanes; i++) r.v[i] = std::fabs(x.v[i]);
  return r;
}

struct Tally { uint32_t v __attribute__((vector_size(64))); };
inline constexpr int kTally = 31;  // in each byte of a lane
JOM_INLINE Tally apart(Tally t, Bytes w, uint32_t x) {
  Tally d;
  std::memcpy(&d, &w, sizeof d);
  d.v ^= x;
  d.v -= (d.v >> 1) & 0x55555555u;
  d.v = (d.v & 0x33333333u) + ((d.v >> 2) & 0x33333333u);
  t.v += (d.v + (d.v >> 4)) & 0x0f0f0f0fu;
  return t;
}
JOM_INLINE Ints total(Tally t) {
  t.v = (t.v & 0x00ff00ffu) + ((t.v >> 8) & 0x00ff00ffu);
  t.v = (t.v & 0xffffu) + (t.v >> 16);
  Ints r;
  std::memcpy(&r, &t, sizeof r);
  return r;
}

#endif

JOM_INLINE void store_ints(int32_t* p, Ints a) { std::memcpy(p, &a, kLanes * sizeof *p); }

// The sum of all lanes, in the same order everywhere.
JOM_INLINE float sum(Floats x) {
  float all[kLanes];
  store(all, x);
  for (int half = kLanes / 2; half; half /= 2) {
    for (int i = 0; i < half; i++) all[i] += all[i + half];
  }
  return all[0];
}

// Lanes from `at` on, float32 or bfloat16; those beyond n are zero.
JOM_INLINE Floats load_as(const void* x, int64_t at, bool bf16, int n) {
  if (!bf16) {
    const float* p = static_cast<const float*>(x) + at;
    return n == kLanes ? load(p) : load(p, n);
  }
  const uint16_t* p = static_cast<const uint16_t*>(x) + at;
  float all[kLanes] = {};
  for (int i = 0; i < n; i++) all[i] = from_bf16(p[i]);
  return load(all);
}

}  // namespace jom

#endif  // JOM_SIGNS_H_
