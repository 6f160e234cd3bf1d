// How the codes of a chunk become bytes, step by step; the layout is in cpu.h.
#ifndef JOM_MATMUL_STEPS_H_
#define JOM_MATMUL_STEPS_H_

#include "cpu.h"

namespace jom {

template <int NV>
using Vectors = Bytes[NV];

template <int NV>
JOM_INLINE void load_line(Vectors<NV>& w, const uint8_t* p) {
  JOM_UNROLL
  for (int v = 0; v < NV; v++) w[v] = load_bytes(p + 64 * v);
}

template <int N, int NV, typename F>
JOM_INLINE void narrow_step(int s, const Vectors<NV>& raw, uint8_t mask, F&& f) {
  Bytes w[NV];
  JOM_UNROLL
  for (int v = 0; v < NV; v++) w[v] = bits_of<N>(raw[v], mask);
  f(s, w);
}

// Step S of three bits: two of `low`, and bit S of `top` moved to bit 2.
template <int S, int NV, typename F>
JOM_INLINE void three_bit_step(const Vectors<NV>& low, const Vectors<NV>& top, F&& f) {
  Bytes w[NV];
  JOM_UNROLL
  for (int v = 0; v < NV; v++) {
    Bytes t = S < 2 ? shift_up<(S < 2 ? 2 - S : 0)>(top[v]) : top[v];
    w[v] = either(bits_of<2 * (S % 4)>(low[v], 3), bits_of<(S < 2 ? 0 : S - 2)>(t, 4));
  }
  f(S, w);
}

// Calls f(step, codes of NV vectors) for the eight steps of a chunk at p.
template <int BITS, int NV, typename F>
JOM_INLINE void each_step(const uint8_t* p, F&& f) {
  constexpr int line = kPanel * 4;
  Bytes raw[NV];
  if constexpr (BITS == 8) {
    for (int s = 0; s < kSteps; s++) {
      load_line<NV>(raw, p + s * line);
      f(s, raw);
    }
  } else if constexpr (BITS == 4) {
    JOM_UNROLL
    for (int i = 0; i < 4; i++) {
      load_line<NV>(raw, p + i * line);
      narrow_step<0, NV>(2 * i, raw, 15, f);
      narrow_step<4, NV>(2 * i + 1, raw, 15, f);
    }
  } else if constexpr (BITS == 2) {
    JOM_UNROLL
    for (int i = 0; i < 2; i++) {
      load_line<NV>(raw, p + i * line);
      narrow_step<0, NV>(4 * i, raw, 3, f);
      narrow_step<2, NV>(4 * i + 1, raw, 3, f);
      narrow_step<4, NV>(4 * i + 2, raw, 3, f);
      narrow_step<6, NV>(4 * i + 3, raw, 3, f);
    }
  } else if constexpr (BITS == 3) {
    Bytes top[NV];
    load_line<NV>(top, p + 2 * line);
    load_line<NV>(raw, p);
    three_bit_step<0, NV>(raw, top, f);
    three_bit_step<1, NV>(raw, top, f);
    three_bit_step<2, NV>(raw, top, f);
    three_bit_step<3, NV>(raw, top, f);
    load_line<NV>(raw, p + line);
    three_bit_step<4, NV>(raw, top, f);
    three_bit_step<5, NV>(raw, top, f);
    three_bit_step<6, NV>(raw, top, f);
    three_bit_step<7, NV>(raw, top, f);
  } else {
    static_assert(BITS == 1);
    load_line<NV>(raw, p);
    narrow_step<0, NV>(0, raw, 1, f);
    narrow_step<1, NV>(1, raw, 1, f);
    narrow_step<2, NV>(2, raw, 1, f);
    narrow_step<3, NV>(3, raw, 1, f);
    narrow_step<4, NV>(4, raw, 1, f);
    narrow_step<5, NV>(5, raw, 1, f);
    narrow_step<6, NV>(6, raw, 1, f);
    narrow_step<7, NV>(7, raw, 1, f);
  }
}

}  // namespace jom

#endif  // JOM_MATMUL_STEPS_H_
