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

#elif JOM_AVX2

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

#elif JOM_NEON

struct Bytes { uint8x16_t v[4]; };
struct Ints { int32x4_t v[4]; };
struct Floats { float32x4_t v[4]; };

#define JOM_EACH(T, expr)                      \
  T r;                                         \
  for (int i = 0; i < 4; i++) r.v[i] = (expr); \
  return r;
JOM_INLINE Bytes load_bytes(const uint8_t* p) { JOM_EACH(Bytes, vld1q_u8(p + 16 * i)) }
JOM_INLINE void store_bytes(uint8_t* p, Bytes a) {
  for (int i = 0; i < 4; i++) vst1q_u8(p + 16 * i, a.v[i]);
}
template <int N>
JOM_INLINE Bytes bits_of(Bytes a, uint8_t mask) {
  JOM_EACH(Bytes, vandq_u8(vshlq_u8(a.v[i], vdupq_n_s8(-N)), vdupq_n_u8(mask)))
}
template <int N>
JOM_INLINE Bytes shift_up(Bytes a) { JOM_EACH(Bytes, vshlq_n_u8(a.v[i], N)) }
JOM_INLINE Bytes either(Bytes a, Bytes b) { JOM_EACH(Bytes, vorrq_u8(a.v[i], b.v[i])) }
JOM_INLINE Ints ints(int32_t x) { JOM_EACH(Ints, vdupq_n_s32(x)) }
JOM_INLINE Ints joined(Ints high, Ints low) {
  JOM_EACH(Ints, vaddq_s32(vshlq_n_s32(high.v[i], 8), low.v[i]))
}
JOM_INLINE Ints dot4(Ints acc, Bytes w, int32_t four) {
  // The products of signed bytes w - 128, and 128 times the sum of the other operand.
  int8x16_t a = vreinterpretq_s8_s32(vdupq_n_s32(four));
  int32x4_t whole = vdotq_s32(vdupq_n_s32(0), a, vdupq_n_s8(64));
  JOM_EACH(Ints, vdotq_s32(vaddq_s32(acc.v[i], vshlq_n_s32(whole, 1)),
                           vreinterpretq_s8_u8(veorq_u8(w.v[i], vdupq_n_u8(128))), a))
}
JOM_INLINE Floats floats(float x) { JOM_EACH(Floats, vdupq_n_f32(x)) }
JOM_INLINE Floats to_floats(Ints a) { JOM_EACH(Floats, vcvtq_f32_s32(a.v[i])) }
JOM_INLINE Floats load(const float* p) { JOM_EACH(Floats, vld1q_f32(p + 4 * i)) }
JOM_INLINE void store(float* p, Floats a) {
  for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.v[i]);
}
JOM_INLINE Floats operator+(Floats a, Floats b) { JOM_EACH(Floats, vaddq_f32(a.v[i], b.v[i])) }
JOM_INLINE Floats operator-(Floats a, Floats b) { JOM_EACH(Floats, vsubq_f32(a.v[i], b.v[i])) }
JOM_INLINE Floats operator*(Floats a, Floats b) { JOM_EACH(Floats, vmulq_f32(a.v[i], b.v[i])) }
JOM_INLINE Floats operator/(Floats a, Floats b) { JOM_EACH(Floats, vdivq_f32(a.v[i], b.v[i])) }
JOM_INLINE Floats least(Floats a, Floats b) {
  JOM_EACH(Floats, vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]))
}
JOM_INLINE Floats most(Floats a, Floats b) {
  JOM_EACH(Floats, vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]))
}
JOM_INLINE Ints to_ints(Floats whole) { JOM_EACH(Ints, vcvtq_s32_f32(whole.v[i])) }
JOM_INLINE Ints operator+(Ints a, Ints b) { JOM_EACH(Ints, vaddq_s32(a.v[i], b.v[i])) }
JOM_INLINE Ints high_of(Ints a) {
  JOM_EACH(Ints, vshrq_n_s32(vaddq_s32(a.v[i], vdupq_n_s32(128)), 8))
}
JOM_INLINE Ints low_of(Ints a, Ints high) {
  JOM_EACH(Ints, vsubq_s32(a.v[i], vshlq_n_s32(high.v[i], 8)))
}
JOM_INLINE void store_codes(int8_t* p, Ints a) {
  int16x8_t first = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
  int16x8_t second = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
  vst1q_s8(p, vcombine_s8(vmovn_s16(first), vmovn_s16(second)));
}
JOM_INLINE int32_t sum_of(Ints a) {
  return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[1]), vaddq_s32(a.v[2], a.v[3])));
}
#undef JOM_EACH

#else

// Vectors of the compiler, which makes of them what the processor has.
struct Bytes { uint8_t v __attribute__((vector_size(64))); };
struct Ints { int32_t v __attribute__((vector_size(64))); };
struct Floats { float v __attribute__((vector_size(64))); };

JOM_INLINE Bytes load_bytes(const uint8_t* p) {
  Bytes r;
  std::memcpy(&r.v, p, 64);
  return r;
}
JOM_INLINE void store_bytes(uint8_t* p, Bytes a) { std::memcpy(p, &a.v, 64); }
template <int N>
JOM_INLINE Bytes bits_of(Bytes a, uint8_t mask) { return {(a.v >> N) & mask}; }
template <int N>
JOM_INLINE Bytes shift_up(Bytes a) { return {a.v << N}; }
JOM_INLINE Bytes either(Bytes a, Bytes b) { return {a.v | b.v}; }
JOM_INLINE Ints ints(int32_t x) { return {Ints{}.v + x}; }
JOM_INLINE Ints joined(Ints high, Ints low) { return {high.v * 256 + low.v}; }
// A call, or tiles take minutes to compile.
__attribute__((noinline)) inline void add_dot4(Ints& acc, const Bytes& w, int32_t four) {
  int8_t a[4];
  std::memcpy(a, &four, 4);
  for (int i = 0; i < kLanes; i++) {
    acc.v[i] += w.v[4 * i] * a[0] + w.v[4 * i + 1] * a[1] + w.v[4 * i + 2] * a[2] +
                w.v[4 * i + 3] * a[3];
  }
}
JOM_INLINE Ints dot4(Ints acc, const Bytes& w, int32_t four) {
  add_dot4(acc, w, four);
  return acc;
}
JOM_INLINE Floats floats(float x) { return {Floats{}.v + x}; }
JOM_INLINE Floats to_floats(Ints a) { return {__builtin_convertvector(a.v, decltype(Floats::v))}; }
JOM_INLINE Floats load(const float* p) {
  Floats r;
  std::memcpy(&r.v, p, 64);
  return r;
}
JOM_INLINE void store(float* p, Floats a) { std::memcpy(p, &a.v, 64); }
JOM_INLINE Floats operator+(Floats a, Floats b) { return {a.v + b.v}; }
JOM_INLINE Floats operator-(Floats a, Floats b) { return {a.v - b.v}; }
JOM_INLINE Floats operator*(Floats a, Floats b) { return {a.v * b.v}; }
JOM_INLINE Floats operator/(Floats a, Floats b) { return {a.v / b.v}; }
JOM_INLINE Floats least(Floats a, Floats b) { return {a.v < b.v ? a.v : b.v}; }
JOM_INLINE Floats most(Floats a, Floats b) { return {a.v > b.v ? a.v : b.v}; }

JOM_INLINE Ints to_ints(Floats whole) { return {__builtin_convertvector(whole.v, decltype(Ints::v))}; }
JOM_INLINE Ints operator+(Ints a, Ints b) { return {a.v + b.v}; }
JOM_INLINE Ints high_of(Ints a) { return {(a.v + 128) >> 8}; }
JOM_INLINE Ints low_of(Ints a, Ints high) { return {a.v - high.v * 256}; }
JOM_INLINE void store_codes(int8_t* p, Ints a) {
  for (int i = 0; i < kLanes; i++) p[i] = (int8_t)a.v[i];
}
JOM_INLINE int32_t sum_of(Ints a) {
  int32_t total = 0;
  for (int i = 0; i < kLanes; i++) total += a.v[i];
  return total;
}

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
