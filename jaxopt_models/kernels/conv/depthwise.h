// Convolutions in which every channel has a window of its own.
//
// Codes are kept as floats: their products and sums are whole numbers below 2^24, so nothing is
// lost, and a channel is a lane.
#ifndef JOM_CONV_DEPTHWISE_H_
#define JOM_CONV_DEPTHWISE_H_

#include "image.h"

namespace jom {

// Weights of a depthwise convolution as whole numbers: [window][channels], less offset and zero; or
// the values of a table.
inline void depthwise_weights(const Matmul& p, float* to) {
  const int per = 8 / p.bits, offset = 1 << (p.bits - 1);
  for (int64_t k = 0; k < p.k; k++) {
    const int64_t chunk = k / kChunk, s = k % kChunk / 4;
    for (int64_t c = 0; c < p.n; c++) {
      const uint8_t* w = p.w + (c / kPanel * p.chunks + chunk) * p.bits * kPanel * 4;
      const int64_t at = c % kPanel * 4 + k % 4, line = kPanel * 4;
      int q;
      if (p.bits == 3) {
        q = (w[s / 4 * line + at] >> (2 * (s % 4)) & 3) | (w[2 * line + at] >> s & 1) << 2;
      } else {
        q = w[s / per * line + at] >> (p.bits * (s % per)) & ((1 << p.bits) - 1);
      }
      const float zero = p.zero ? p.zero[c / kPanel * kPanel + c % kPanel] : 0.0f;
      to[k * p.n + c] = p.table ? p.table[q] : (float)(q - offset) - zero;
    }
  }
}

// Rounds an example, its codes less the zero point kept as floats; without rounding a copy.
inline void float_image(const Conv& a, const Pool& pool, const Grid* grids, float* to) {
  const int64_t size = a.height * a.width * a.channels;
  each_piece(a, pool, [&](int64_t example, int64_t start, int64_t n, const float* x) {
    float* q = to + example * size + start;
    if (a.product.inputs == Inputs::kFloat) {
      std::memcpy(q, x, n * sizeof(float));
    } else {
      to_whole(x, n, grids[example], q);
    }
  });
}

// Adds up one window of 16 V channels.
template <int V>
JOM_INLINE void add_window(const Conv& a, const float* image, const float* w, int64_t top,
                           int64_t left, int64_t channel, int lanes, Floats (&acc)[V]) {
  const int64_t n = a.channels;
  for (int64_t i = 0; i < a.window[0]; i++) {
    const int64_t y = top + i * a.dilation[0];
    if (y < 0 || y >= a.height) continue;
    for (int64_t j = 0; j < a.window[1]; j++) {
      const int64_t x = left + j * a.dilation[1];
      if (x < 0 || x >= a.width) continue;
      const float* p = image + (y * a.width + x) * n + channel;
      const float* q = w + (i * a.window[1] + j) * n + channel;
      JOM_UNROLL
      for (int v = 0; v < V; v++) {
        Floats xv = lanes == kLanes ? load(p + v * kLanes) : load(p, lanes);
        Floats wv = lanes == kLanes ? load(q + v * kLanes) : load(q, lanes);
        acc[v] = acc[v] + xv * wv;
      }
    }
  }
}

template <int V>
void depthwise_row(const Conv& a, const float* image, const float* w, const Grid& grid,
                   int64_t example, int64_t out_y, int64_t channel, int lanes) {
  const Matmul& p = a.product;
  const bool whole = p.inputs != Inputs::kFloat;
  for (int64_t out_x = 0; out_x < a.out_width; out_x++) {
    Floats acc[V];
    JOM_UNROLL
    for (int v = 0; v < V; v++) acc[v] = floats(0.0f);
    add_window<V>(a, image, w, out_y * a.stride[0] - a.before[0], out_x * a.stride[1] - a.before[1],
                  channel, lanes, acc);
    const int64_t to = ((example * a.out_height + out_y) * a.out_width + out_x) * p.n;
    for (int v = 0; v < V; v++) {
      const int64_t c = channel + v * kLanes;
      Floats y = whole ? acc[v] * floats(grid.scale) : acc[v];
      y = y * load(p.scale + c);  // scales are filled up to whole panels
      if (p.bias) y = y + load(p.bias + c, lanes);
      store_as(p.y, to + c, p.y_bf16, activated(y, p.act), lanes);
    }
  }
}

inline void depthwise(const Conv& a, const Pool& pool) {
  const Matmul& p = a.product;
  const int64_t size = a.height * a.width * a.channels;
  Scratch weights(p.k * p.n * sizeof(float)), image(a.batch * size * sizeof(float));
  std::vector<Grid> grids(a.batch);
  depthwise_weights(p, weights.as<float>());
  choose_grids(a, pool, grids.data());
  float_image(a, pool, grids.data(), image.as<float>());
  pool.each((int)(a.batch * a.out_height), [&](int i) {
    const int64_t example = i / a.out_height, y = i % a.out_height;
    const float* x = image.as<float>() + example * size;
    int64_t c = 0;
    for (; c + 4 * kLanes <= a.channels; c += 4 * kLanes) {
      depthwise_row<4>(a, x, weights.as<float>(), grids[example], example, y, c, kLanes);
    }
    for (; c < a.channels; c += kLanes) {
      const int lanes = (int)std::min<int64_t>(kLanes, a.channels - c);
      depthwise_row<1>(a, x, weights.as<float>(), grids[example], example, y, c, lanes);
    }
  });
}

}  // namespace jom

#endif  // JOM_CONV_DEPTHWISE_H_
