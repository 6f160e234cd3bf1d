// Packed integer weights of any value, and plain rounding of inputs.
#ifndef JOM_TESTS_DRIVER_PACKED_H_
#define JOM_TESTS_DRIVER_PACKED_H_

#include "driver.h"
#include "matmul/cpu.h"

struct Weights {
  Weights(Random& r, int64_t k, int64_t n, int64_t groups)
      : bits((int[]){1, 2, 3, 4, 8}[r.upto(4)]), panels((n + 63) / 64), chunks((k + 31) / 32),
        groups(groups), k(k), n(n), with_table(bits == 4 && r.one_in(2)),
        with_zero(!with_table && r.one_in(2)), bytes(panels * chunks * 256 * bits),
        scale(panels * groups * 64), zero(panels * groups * 64), sums(panels * groups * 64),
        table(16), value(k * n), weight(k * n) {
    for (size_t i = 0; i < bytes.size; i++) bytes.data[i] = (uint8_t)r.engine();
    for (size_t i = 0; i < scale.size; i++) {
      scale.data[i] = (float)(1 + r.upto(7)) / 8.0f;
      zero.data[i] = with_zero ? (float)(r.upto(4) - 2) : 0.0f;
      sums.data[i] = 0.0f;
    }
    for (int i = 0; i < 16; i++) table.data[i] = r.number();
    for (int64_t i = 0; i < chunks * 32; i++) {
      for (int64_t j = 0; j < panels * 64; j++) {
        // Beyond the matrix codes are the offset, so that they are nothing.
        if (i >= k || j >= n) set(i, j, 1 << (bits - 1));
        if (i >= k || j >= n) continue;
        const int64_t g = groups == 1 ? 0 : i / (k / groups), at = (j / 64 * groups + g) * 64 + j % 64;
        const int q = code(i, j) - (1 << (bits - 1));
        sums.data[at] += (float)q - zero.data[at];
        value[i * n + j] = with_table ? table.data[q + 8] : q - zero.data[at];
        value[i * n + j] *= scale.data[at];
        // What is added up on the way, and what a code of a table may be off by.
        weight[i * n + j] = (with_table ? 4.0 : std::abs(q) + 2.0) * scale.data[at];
      }
    }
  }
  // Where bits [from, from + count) of a code are.
  template <typename F>
  void places(int64_t i, int64_t j, F&& f) const {
    const int64_t s = i % 32 / 4, at = j % 64 * 4 + i % 4;
    uint8_t* p = bytes.data + ((j / 64) * chunks + i / 32) * 256 * bits;
    if (bits == 3) {
      f(p + s / 4 * 256 + at, 2 * (s % 4), 2, 0);
      f(p + 512 + at, s, 1, 2);
    } else {
      const int64_t per = 8 / bits;
      f(p + s / per * 256 + at, bits * (s % per), bits, 0);
    }
  }
  void set(int64_t i, int64_t j, int q) {
    places(i, j, [&](uint8_t* p, int64_t shift, int count, int from) {
      const int mask = (1 << count) - 1;
      *p = (uint8_t)((*p & ~(mask << shift)) | ((q >> from & mask) << shift));
    });
  }
  int code(int64_t i, int64_t j) const {
    int q = 0;
    places(i, j, [&](uint8_t* p, int64_t shift, int count, int from) {
      q |= (*p >> shift & ((1 << count) - 1)) << from;
    });
    return q;
  }
  int bits;
  int64_t panels, chunks, groups, k, n;
  bool with_table, with_zero;
  Exact<uint8_t> bytes;
  Exact<float> scale, zero, sums, table;
  std::vector<double> value, weight;  // [k, n]
};

inline void fill(Random& r, jom::Matmul& a, const Weights& w) {
  a.n = w.n, a.k = w.k, a.panels = w.panels, a.chunks = w.chunks, a.groups = w.groups;
  a.first = 0, a.last = a.n, a.bits = w.bits, a.w = w.bytes.data, a.scale = w.scale.data;
  a.zero = w.with_zero ? w.zero.data : nullptr;
  a.table = w.with_table ? w.table.data : nullptr;
  do {
    a.inputs = (jom::Inputs)r.upto(3), a.input_bits = 8 - (r.one_in(2) ? r.upto(6) : 0);
    a.input_symmetric = a.inputs == jom::Inputs::kStatic ? r.one_in(2)
                                                         : a.inputs != jom::Inputs::kRowPair;
    a.sums = a.input_symmetric ? nullptr : w.sums.data;
  } while (a.table && a.sums);  // which do not go together
  a.input_scale = 0.05f, a.input_zero = (float)r.upto((1 << a.input_bits) - 1);
  a.act = (jom::Activation)r.upto((int)jom::Activation::kCount - 1);
}

// Inputs that share a grid, as they are after rounding, and how far a product may be off.
struct Grid {
  Grid(const jom::Matmul& a, const float* x, int64_t n) {
    float low = 0, high = 0;
    for (int64_t i = 0; i < n; i++) {
      finite = finite && std::isfinite(x[i]);
      low = std::fmin(low, x[i]), high = std::fmax(high, x[i]);
    }
    most = std::fmax(-low, high);
    const float levels = (float)((1 << a.input_bits) - 1), half = (levels - 1) / 2;
    scale = a.input_scale, least = -half, greatest = half;
    whole = a.inputs != jom::Inputs::kFloat;
    if (a.inputs == jom::Inputs::kRow) scale = most / half;
    if (a.inputs == jom::Inputs::kRowPair) scale = (high - low) / levels;
    if (!(scale >= std::numeric_limits<float>::min())) scale = 1;
    if (!a.input_symmetric) {
      const float zero =
          a.inputs == jom::Inputs::kStatic ? a.input_zero : std::nearbyint(-low / scale);
      least = -zero, greatest = levels - zero;
    }
    // 16 bits of the largest input or value of a table; the product of the low halves is left out.
    const double step = 1.0 / 65278;
    unsure = whole ? (a.table ? step * scale * 256 : 0) : (a.table ? 4 : 1) * step * most;
    unsure += 1e-6 * (whole ? 512 * scale : most);
  }
  double of(float x) const {
    if (!whole) return x;
    return (double)scale * std::fmin(greatest, std::fmax(least, std::nearbyint(x / scale)));
  }
  bool whole, finite = true;
  float scale, least, greatest, most;
  double unsure;  // of one input times its weight
};

inline double activated(double x, jom::Activation act) {
  switch (act) {
    case jom::Activation::kRelu: return std::fmax(x, 0);
    case jom::Activation::kGelu: return x * 0.5 * std::erfc(-x * std::sqrt(0.5));
    case jom::Activation::kGeluTanh:
      return x / (1 + std::exp(-2 * std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
    case jom::Activation::kSilu: return x / (1 + std::exp(-x));
    case jom::Activation::kSigmoid: return 1 / (1 + std::exp(-x));
    case jom::Activation::kTanh: return std::tanh(x);
    default: return x;
  }
}

#endif  // JOM_TESTS_DRIVER_PACKED_H_
