// Images in pieces, and the grids of their examples.
#ifndef JOM_CONV_IMAGE_H_
#define JOM_CONV_IMAGE_H_

#include <algorithm>

#include "../_native/quantize.h"
#include "cpu.h"

namespace jom {

inline void widen(const void* x, bool bf16, int64_t from, int64_t n, float* to) {
  if (bf16) {
    const uint16_t* p = static_cast<const uint16_t*>(x) + from;
    for (int64_t i = 0; i < n; i++) to[i] = from_bf16(p[i]);
  } else {
    std::memcpy(to, static_cast<const float*>(x) + from, n * sizeof(float));
  }
}

inline constexpr int64_t kImagePiece = 4096;

// Calls f(example, start, n, values) for pieces of all examples.
template <typename F>
void each_piece(const Conv& a, const Pool& pool, F&& f) {
  const int64_t size = a.height * a.width * a.channels, per = (size + kImagePiece - 1) / kImagePiece;
  const int64_t all = a.batch * per, pieces = std::min<int64_t>(all, 8 * pool.threads());
  pool.each((int)pieces, [&](int p) {
    float wide[kImagePiece];
    for (int64_t i = all * p / pieces; i < all * (p + 1) / pieces; i++) {
      const int64_t example = i / per, start = i % per * kImagePiece;
      const int64_t n = std::min(kImagePiece, size - start), from = example * size + start;
      const float* x = static_cast<const float*>(a.product.x) + from;
      if (a.product.x_bf16) {
        widen(a.product.x, true, from, n, wide);
        x = wide;
      }
      f(example, start, n, x);
    }
  });
}

// Chooses the grid of every example.
inline void choose_grids(const Conv& a, const Pool& pool, Grid* grids) {
  struct Range {
    std::atomic<uint32_t> most{0};
    std::atomic<float> low{0.0f}, high{0.0f};
  };
  std::vector<Range> ranges(a.batch);
  const bool pair = a.product.inputs == Inputs::kRowPair;
  each_piece(a, pool, [&](int64_t example, int64_t, int64_t n, const float* x) {
    Range& r = ranges[example];
    const uint32_t most = largest(x, n);
    for (uint32_t old = r.most; most > old && !r.most.compare_exchange_weak(old, most);) {
    }
    if (!pair) return;
    float low = 0.0f, high = 0.0f;
    for (int64_t i = 0; i < n; i++) {
      low = x[i] < low ? x[i] : low;
      high = x[i] > high ? x[i] : high;
    }
    for (float old = r.low; low < old && !r.low.compare_exchange_weak(old, low);) {
    }
    for (float old = r.high; high > old && !r.high.compare_exchange_weak(old, high);) {
    }
  });
  for (int64_t b = 0; b < a.batch; b++) {
    grids[b] = grid_from(a.product, ranges[b].most, ranges[b].low, ranges[b].high);
  }
}

}  // namespace jom

#endif  // JOM_CONV_IMAGE_H_
