// NEON with dot products: a vector is four registers. Included by isa.h, inside its namespace.

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
JOM_INLINE Bytes lookup(const uint8_t* table, Bytes at) {
  JOM_EACH(Bytes, vqtbl1q_u8(vld1q_u8(table), at.v[i]))
}
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
