// AVX2: a vector is two registers. Included by isa.h, inside its namespace.

struct Bytes { __m256i lo, hi; };
struct Ints { __m256i lo, hi; };
struct Floats { __m256 lo, hi; };

JOM_INLINE Bytes load_bytes(const uint8_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
JOM_INLINE void store_bytes(uint8_t* p, Bytes a) {
  _mm256_storeu_si256((__m256i*)p, a.lo);
  _mm256_storeu_si256((__m256i*)(p + 32), a.hi);
}
template <int N>
JOM_INLINE Bytes bits_of(Bytes a, uint8_t mask) {
  __m256i m = _mm256_set1_epi8((char)mask);
  __m256i lo = N ? _mm256_srli_epi16(a.lo, N) : a.lo, hi = N ? _mm256_srli_epi16(a.hi, N) : a.hi;
  return {_mm256_and_si256(lo, m), _mm256_and_si256(hi, m)};
}
template <int N>
JOM_INLINE Bytes shift_up(Bytes a) {
  return {_mm256_slli_epi16(a.lo, N), _mm256_slli_epi16(a.hi, N)};
}
JOM_INLINE Bytes either(Bytes a, Bytes b) {
  return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)};
}
JOM_INLINE Bytes lookup(const uint8_t* table, Bytes at) {
  __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
  return {_mm256_shuffle_epi8(t, at.lo), _mm256_shuffle_epi8(t, at.hi)};
}
JOM_INLINE Ints ints(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
JOM_INLINE Ints joined(Ints high, Ints low) {
  return {_mm256_add_epi32(_mm256_slli_epi32(high.lo, 8), low.lo),
          _mm256_add_epi32(_mm256_slli_epi32(high.hi, 8), low.hi)};
}
JOM_INLINE Ints dot4(Ints acc, Bytes w, int32_t four) {
#if defined(__AVXVNNI__)
  __m256i a = _mm256_set1_epi32(four);
  return {_mm256_dpbusd_avx_epi32(acc.lo, w.lo, a), _mm256_dpbusd_avx_epi32(acc.hi, w.hi, a)};
#else
  // Bytes 0 and 2, then 1 and 3 of each lane as 16-bit pairs: their products cannot saturate.
  __m256i a = _mm256_set1_epi32(four), low = _mm256_set1_epi16(0xff);
  __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), odd = _mm256_srai_epi16(a, 8);
  auto one = [&](__m256i acc, __m256i w) {
    __m256i e = _mm256_madd_epi16(_mm256_and_si256(w, low), even);
    __m256i o = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), odd);
    return _mm256_add_epi32(acc, _mm256_add_epi32(e, o));
  };
  return {one(acc.lo, w.lo), one(acc.hi, w.hi)};
#endif
}
JOM_INLINE Floats floats(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
JOM_INLINE Floats to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
JOM_INLINE Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
JOM_INLINE void store(float* p, Floats a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
#define JOM_PAIR(op, f) \
  JOM_INLINE Floats op(Floats a, Floats b) { return {f(a.lo, b.lo), f(a.hi, b.hi)}; }
JOM_PAIR(operator+, _mm256_add_ps)
JOM_PAIR(operator-, _mm256_sub_ps)
JOM_PAIR(operator*, _mm256_mul_ps)
JOM_PAIR(operator/, _mm256_div_ps)
JOM_PAIR(least, _mm256_min_ps)
JOM_PAIR(most, _mm256_max_ps)
#undef JOM_PAIR

JOM_INLINE Ints to_ints(Floats whole) {
  return {_mm256_cvtps_epi32(whole.lo), _mm256_cvtps_epi32(whole.hi)};
}
JOM_INLINE Ints operator+(Ints a, Ints b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
JOM_INLINE Ints high_of(Ints a) {
  __m256i half = _mm256_set1_epi32(128);
  return {_mm256_srai_epi32(_mm256_add_epi32(a.lo, half), 8),
          _mm256_srai_epi32(_mm256_add_epi32(a.hi, half), 8)};
}
JOM_INLINE Ints low_of(Ints a, Ints high) {
  return {_mm256_sub_epi32(a.lo, _mm256_slli_epi32(high.lo, 8)),
          _mm256_sub_epi32(a.hi, _mm256_slli_epi32(high.hi, 8))};
}
JOM_INLINE void store_codes(int8_t* p, Ints a) {
  __m256i pairs = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
  __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  _mm_storeu_si128((__m128i*)p, bytes);
}
JOM_INLINE int32_t sum_of(Ints a) {
  int32_t all[8], total = 0;
  _mm256_storeu_si256((__m256i*)all, _mm256_add_epi32(a.lo, a.hi));
  for (int32_t x : all) total += x;
  return total;
}
