// Inputs as signed bytes with scales, in the order in which products read them.
#ifndef JOM_QUANTIZE_H_
#define JOM_QUANTIZE_H_

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

#include "isa.h"

namespace jom {

// To the nearest integer, ties to even, for magnitudes below 2^22.
JOM_INLINE float rounded(float x) {
  constexpr float big = 12582912.0f;
  return (x + big) - big;
}
JOM_INLINE Floats rounded(Floats x) {
  const Floats big = floats(12582912.0f);
  return (x + big) - big;
}

JOM_INLINE Floats limited(Floats x, float low, float high) {
  return least(most(x, floats(low)), floats(high));
}

// The largest magnitude as bits: above those of every finite number if there is a NaN or Inf.
inline uint32_t largest(const float* x, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  return most;
}

// The largest number of two signed bytes, 256 high + low.
inline constexpr float kSixteenBits = 127 * 256 + 127;
inline constexpr uint32_t kInfinity = 0x7f800000;

JOM_INLINE float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// A scale that can be divided by; as the grids of the library choose it.
JOM_INLINE float usable(float scale) { return scale >= FLT_MIN ? scale : 1.0f; }

struct Grid {
  float scale, zero;  // the zero point less 2^(bits - 1), so that codes are signed
  float low, high;    // of the codes
};

// The grid of inputs of which the largest magnitude, as bits, the least and the greatest, zero among
// them, are known; its scale is NaN where an input is not finite.
template <typename Spec>
Grid grid_from(const Spec& a, uint32_t most, float least, float greatest) {
  using Inputs = decltype(a.inputs);
  const int half = 1 << (a.input_bits - 1);
  Grid g{a.input_scale, 0.0f, (float)(1 - half), (float)(half - 1)};
  if (a.inputs == Inputs::kFloat) {
    g.scale = as_float(most) / kSixteenBits;
    g.low = -kSixteenBits, g.high = kSixteenBits;
  } else if (a.inputs == Inputs::kRow) {
    g.scale = usable(as_float(most) / (float)(half - 1));
  } else if (a.inputs == Inputs::kRowPair || !a.input_symmetric) {
    const bool pair = a.inputs == Inputs::kRowPair;
    if (pair) g.scale = usable((greatest - least) / (float)(2 * half - 1));
    g.zero = (pair ? rounded(-least / g.scale) : a.input_zero) - (float)half;
    g.low = (float)-half;
  }
  // A zero point becomes a code, which a NaN or what is too large for one cannot.
  const bool fits = g.zero >= -kSixteenBits && g.zero <= kSixteenBits;
  if (most >= kInfinity || !fits) g.scale = std::numeric_limits<float>::quiet_NaN();
  if (!fits) g.zero = 0.0f;
  return g;
}

template <typename Spec>
Grid grid_of(const Spec& a, const float* x, int64_t n) {
  float least = 0.0f, greatest = 0.0f;
  if (a.inputs == decltype(a.inputs)::kRowPair) {
    for (int64_t i = 0; i < n; i++) {
      least = x[i] < least ? x[i] : least;
      greatest = x[i] > greatest ? x[i] : greatest;
    }
  }
  return grid_from(a, largest(x, n), least, greatest);
}

// Calls f(start, lanes, values) for 16 inputs at a time, the last ones filled up with zeros.
template <typename F>
JOM_INLINE void each_vector(const float* x, int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes, load(x + i));
  if (i < n) f(i, (int)(n - i), load(x + i, (int)(n - i)));
}

// Writes the first lanes of codes.
JOM_INLINE void store_codes(int8_t* p, Ints codes, int lanes) {
  if (lanes == kLanes) return store_codes(p, codes);
  int8_t all[kLanes];
  store_codes(all, codes);
  std::memcpy(p, all, lanes);
}

// The codes of inputs less the zero point, as floats. Limits are whole numbers, so an input may be
// limited before it is rounded.
JOM_INLINE Floats whole_of(Floats x, const Grid& g) {
  return rounded(limited(x / floats(g.scale), g.low - g.zero, g.high - g.zero));
}

// Rounds n inputs to whole numbers, the zero point taken off; NaN passes by the scale.
inline void to_whole(const float* x, int64_t n, const Grid& g, float* q) {
  if (!(g.scale == g.scale)) {
    std::fill(q, q + n, 0.0f);
    return;
  }
  each_vector(x, n, [&](int64_t i, int lanes, Floats v) __attribute__((always_inline)) {
    lanes == kLanes ? store(q + i, whole_of(v, g)) : store(q + i, whole_of(v, g), lanes);
  });
}

// Rounds n inputs to a grid, and returns their sum as codes.
inline int32_t to_codes(const float* x, int64_t n, const Grid& g, int8_t* q) {
  if (!(g.scale == g.scale)) {
    std::memset(q, 0, n);
    return 0;
  }
  const Ints zero = ints((int32_t)g.zero);
  Ints total = ints(0);
  each_vector(x, n, [&](int64_t i, int lanes, Floats v) __attribute__((always_inline)) {
    const Ints whole = to_ints(whole_of(v, g));  // zero where an input was filled up
    total = total + whole;
    store_codes(q + i, whole + zero, lanes);
  });
  return sum_of(total) + (int32_t)g.zero * (int32_t)n;
}

// Writes n codes four at a time, `stride` bytes apart.
inline void spread_row(const int8_t* codes, int64_t n, int8_t* to, int64_t stride) {
  for (int64_t i = 0; i < n; i += 4, to += stride) std::memcpy(to, codes + i, 4);
}

// Rounds inputs to 16 bits, as two bytes, by a scale that may be zero or NaN.
inline void to_digits(const float* x, int64_t n, float scale, int8_t* high, int8_t* low,
                      int32_t totals[2]) {
  totals[0] = totals[1] = 0;
  const float step = 1.0f / scale;
  if (!(step <= FLT_MAX)) {  // not finite; or zero, or a denormal number
    std::memset(high, 0, n);
    std::memset(low, 0, n);
    return;
  }
  Ints sum_high = ints(0), sum_low = ints(0);
  each_vector(x, n, [&](int64_t i, int lanes, Floats v) __attribute__((always_inline)) {
    const Ints c = to_ints(rounded(limited(v * floats(step), -kSixteenBits, kSixteenBits)));
    const Ints h = high_of(c), l = low_of(c, h);
    sum_high = sum_high + h;
    sum_low = sum_low + l;
    store_codes(high + i, h, lanes);
    store_codes(low + i, l, lanes);
  });
  totals[0] = sum_of(sum_high);
  totals[1] = sum_of(sum_low);
}

// The scale of a run of inputs that are rounded to 16 bits; NaN where one is not finite.
inline float scale_of_digits(const float* x, int64_t n) {
  const uint32_t most = largest(x, n);
  return most >= kInfinity ? std::numeric_limits<float>::quiet_NaN() : as_float(most) / kSixteenBits;
}

// Rounds rows `row` to `row + height` of `a.x` [m, k] for one tile; codes are zero beyond k.
template <typename Spec, typename Rounded>
void quantize_rows(const Spec& a, int64_t row, int height, const Rounded& to) {
  constexpr int64_t kPiece = 256;
  const int64_t padded = (a.k + 31) / 32 * 32, segment = to.segment, segments = to.segments;
  const int digits = to.digits;
  Scratch wide(a.x_bf16 ? (a.k + 1) * sizeof(float) : 0);
  for (int r = 0; r < height; r++) {
    const int64_t from = (row + r) * a.k;
    const float* x = static_cast<const float*>(a.x) + from;
    if (a.x_bf16) {
      const uint16_t* half = static_cast<const uint16_t*>(a.x) + from;
      for (int64_t i = 0; i < a.k; i++) wide.template as<float>()[i] = from_bf16(half[i]);
      x = wide.template as<float>();
    }
    Grid grid{};
    if (digits == 1) grid = grid_of(a, x, a.k);
    to.zeros[r] = grid.zero;
    float* scales = to.scales + r * segments;
    int32_t* totals = to.totals + r * segments * digits;
    for (int64_t s = 0; s < segments; s++) scales[s] = grid.scale;
    std::fill(totals, totals + segments * digits, 0);
    // A piece at a time, which stays in the cache; pieces lie within segments or hold some.
    const int64_t piece = digits == 2 ? segment : kPiece;
    for (int64_t start = 0; start < padded; start += piece) {
      int8_t buffer[2][kPiece] = {};
      const int64_t n = std::max<int64_t>(0, std::min(a.k - start, piece));
      if (digits == 2) {
        const int64_t s = start / segment;
        scales[s] = scale_of_digits(x + start, n);
        to_digits(x + start, n, scales[s], buffer[0], buffer[1], totals + 2 * s);
      }
      for (int64_t at = 0; digits == 1 && at < n;) {
        const int64_t s = (start + at) / segment, end = std::min(n, (s + 1) * segment - start);
        totals[s] += to_codes(x + start + at, end - at, grid, buffer[0] + at);
        at = end;
      }
      const int64_t stop = std::min(piece, padded - start);
      for (int d = 0; d < digits; d++) {
        spread_row(buffer[d], stop, to.codes + (start / 4 * digits + d) * height * 4 + r * 4,
                   digits * height * 4);
      }
    }
  }
}

}  // namespace jom

#endif  // JOM_QUANTIZE_H_
