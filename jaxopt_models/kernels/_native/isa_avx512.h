// AVX512 with VNNI: a vector is a register. Included by isa.h, inside its namespace.

struct Bytes { __m512i v; };
struct Ints { __m512i v; };
struct Floats { __m512 v; };

JOM_INLINE Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
JOM_INLINE void store_bytes(uint8_t* p, Bytes a) { _mm512_storeu_si512(p, a.v); }
// Shifts every byte right by n and keeps the low bits of the mask.
template <int N>
JOM_INLINE Bytes bits_of(Bytes a, uint8_t mask) {
  __m512i s = N ? _mm512_srli_epi16(a.v, N) : a.v;
  return {_mm512_and_si512(s, _mm512_set1_epi8((char)mask))};
}
template <int N>
JOM_INLINE Bytes shift_up(Bytes a) { return {_mm512_slli_epi16(a.v, N)}; }
JOM_INLINE Bytes either(Bytes a, Bytes b) { return {_mm512_or_si512(a.v, b.v)}; }
// The bytes of a table of 16 at indices below 16.
JOM_INLINE Bytes lookup(const uint8_t* table, Bytes at) {
  __m512i t = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table));
  return {_mm512_shuffle_epi8(t, at.v)};
}
JOM_INLINE Ints ints(int32_t x) { return {_mm512_set1_epi32(x)}; }
// 256 high + low.
JOM_INLINE Ints joined(Ints high, Ints low) {
  return {_mm512_add_epi32(_mm512_slli_epi32(high.v, 8), low.v)};
}
// Adds to each lane the products of its four unsigned bytes with the four signed bytes of `four`.
JOM_INLINE Ints dot4(Ints acc, Bytes w, int32_t four) {
  // Written out, as GCC copies accumulators around the intrinsic and then runs out of registers.
  asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(_mm512_set1_epi32(four)));
  return acc;
}
JOM_INLINE Floats floats(float x) { return {_mm512_set1_ps(x)}; }
JOM_INLINE Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
JOM_INLINE Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
JOM_INLINE Floats load(const float* p, int n) {
  return {_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p)};
}
JOM_INLINE void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
JOM_INLINE void store(float* p, Floats a, int n) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), a.v);
}
JOM_INLINE Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
JOM_INLINE Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
JOM_INLINE Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
JOM_INLINE Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
// As IEEE comparisons: a NaN in `a` gives `b`.
JOM_INLINE Floats least(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
JOM_INLINE Floats most(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }

JOM_INLINE Ints to_ints(Floats whole) { return {_mm512_cvtps_epi32(whole.v)}; }
JOM_INLINE Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
// Of 256 high + low, where low is -128 to 127.
JOM_INLINE Ints high_of(Ints a) {
  return {_mm512_srai_epi32(_mm512_add_epi32(a.v, _mm512_set1_epi32(128)), 8)};
}
JOM_INLINE Ints low_of(Ints a, Ints high) {
  return {_mm512_sub_epi32(a.v, _mm512_slli_epi32(high.v, 8))};
}
// Stores numbers from -128 to 127 as bytes.
JOM_INLINE void store_codes(int8_t* p, Ints a) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a.v));
}
JOM_INLINE int32_t sum_of(Ints a) { return _mm512_reduce_add_epi32(a.v); }
