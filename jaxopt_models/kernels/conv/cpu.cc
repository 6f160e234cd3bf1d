// Convolutions with packed integer weights.
//
// A convolution is a product of the windows of an image with a matrix. Images are rounded once, to
// the codes that `matmul` takes; windows are put together for a few rows at a time, in the order in
// which tiles read them. Where every channel has a window of its own (depthwise), codes are kept
// as floats: their products and sums are whole numbers below 2^24, so nothing is lost.
#include "cpu.h"

#include <algorithm>

#include "../_native/quantize.h"

namespace jom {
namespace {

// An image as signed bytes, a plane for each digit; an example has one grid.
struct Image {
  int8_t* codes;      // [digit][batch, height, width, channels]
  const Grid* grids;  // [batch]
};

void widen(const void* x, bool bf16, int64_t from, int64_t n, float* to) {
  if (bf16) {
    const uint16_t* p = static_cast<const uint16_t*>(x) + from;
    for (int64_t i = 0; i < n; i++) to[i] = from_bf16(p[i]);
  } else {
    std::memcpy(to, static_cast<const float*>(x) + from, n * sizeof(float));
  }
}

constexpr int64_t kPiece = 4096;

// Calls f(example, start, n, values) for pieces of all examples.
template <typename F>
void each_piece(const Conv& a, const Pool& pool, F&& f) {
  const int64_t size = a.height * a.width * a.channels, per = (size + kPiece - 1) / kPiece;
  const int64_t all = a.batch * per, pieces = std::min<int64_t>(all, 8 * pool.threads());
  pool.each((int)pieces, [&](int p) {
    float wide[kPiece];
    for (int64_t i = all * p / pieces; i < all * (p + 1) / pieces; i++) {
      const int64_t example = i / per, start = i % per * kPiece;
      const int64_t n = std::min(kPiece, size - start), from = example * size + start;
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
void choose_grids(const Conv& a, const Pool& pool, Grid* grids) {
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

void round_image(const Conv& a, const Pool& pool, const Image& to, int digits) {
  const int64_t size = a.height * a.width * a.channels, plane = a.batch * size;
  each_piece(a, pool, [&](int64_t example, int64_t start, int64_t n, const float* x) {
    int8_t* q = to.codes + example * size + start;
    if (digits == 1) {
      to_codes(x, n, to.grids[example], q);
    } else {
      int32_t unused[2];
      to_digits(x, n, to.grids[example].scale, q, q + plane, unused);
    }
  });
}

// The windows of one group of channels as rows of a product.
class Windows {
 public:
  Windows(const Conv& a, const Image& image, int64_t group)
      : a_(a), image_(image), each_(a.channels / a.groups), first_(group * each_) {}

  void operator()(int64_t row, int height, const Rounded& to) const {
    const int64_t padded = a_.product.chunks * kChunk, plane = a_.batch * size();
    Scratch line(padded);
    int8_t* q = line.as<int8_t>();
    std::memset(q, 0, padded);
    for (int r = 0; r < height; r++) {
      const int64_t example = (row + r) / (a_.out_height * a_.out_width);
      const Grid& g = image_.grids[example];
      to.zeros[r] = g.zero;
      for (int64_t s = 0; s < to.segments; s++) to.scales[r * to.segments + s] = g.scale;
      for (int d = 0; d < to.digits; d++) {
        gather(image_.codes + d * plane + example * size(), row + r, (int8_t)g.zero, q);
        int32_t* totals = to.totals + r * to.segments * to.digits + d;
        for (int64_t s = 0; s < to.segments; s++) {
          const int64_t end = std::min((s + 1) * to.segment, padded);
          int32_t total = 0;
          for (int64_t i = s * to.segment; i < end; i++) total += q[i];
          totals[s * to.digits] = total;
        }
        spread_row(q, padded, to.codes + d * height * 4 + r * 4, to.digits * height * 4);
      }
    }
  }

 private:
  int64_t size() const { return a_.height * a_.width * a_.channels; }

  // Copies one window; what lies beyond the image is zero, which the grid has a code for.
  void gather(const int8_t* image, int64_t row, int8_t zero, int8_t* q) const {
    const int64_t place = row % (a_.out_height * a_.out_width);
    const int64_t top = place / a_.out_width * a_.stride[0] - a_.before[0];
    const int64_t left = place % a_.out_width * a_.stride[1] - a_.before[1];
    const bool whole_rows = a_.groups == 1 && a_.dilation[1] == 1 && left >= 0 &&
                            left + a_.window[1] <= a_.width;
    for (int64_t i = 0; i < a_.window[0]; i++) {
      const int64_t y = top + i * a_.dilation[0], run = a_.window[1] * each_;
      if (y < 0 || y >= a_.height) {
        std::memset(q, zero, run);
        q += run;
        continue;
      }
      const int8_t* line = image + y * a_.width * a_.channels + first_;
      if (whole_rows) {
        std::memcpy(q, line + left * a_.channels, run);
        q += run;
        continue;
      }
      for (int64_t j = 0; j < a_.window[1]; j++, q += each_) {
        const int64_t x = left + j * a_.dilation[1];
        if (x < 0 || x >= a_.width) {
          std::memset(q, zero, each_);
        } else {
          std::memcpy(q, line + x * a_.channels, each_);
        }
      }
    }
  }

  const Conv& a_;
  const Image& image_;
  int64_t each_, first_;
};

// ------------------------------------------------------------------ a window for each channel

// Weights of a depthwise convolution as whole numbers: [window][channels], less offset and zero.
void depthwise_weights(const Matmul& p, float* to) {
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
      to[k * p.n + c] = (float)(q - offset) - zero;
    }
  }
}

// Rounds an example, its codes less the zero point kept as floats; without rounding a copy.
void float_image(const Conv& a, const Pool& pool, const Grid* grids, float* to) {
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

void depthwise(const Conv& a, const Pool& pool) {
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

}  // namespace

const char* check(const Conv& a) {
  const Matmul& p = a.product;
  if (a.groups < 1 || a.channels % a.groups || p.n % a.groups) return "groups do not divide";
  for (int i = 0; i < 2; i++) {
    if (a.window[i] < 1 || a.stride[i] < 1 || a.dilation[i] < 1) {
      return "window, stride and dilation are at least 1";
    }
  }
  if (p.k != a.window[0] * a.window[1] * (a.channels / a.groups)) return "k is not that of a window";
  if (p.m != a.batch * a.out_height * a.out_width) return "m is not the number of windows";
  if (p.m > INT32_MAX || a.batch * a.out_height > INT32_MAX) return "too many windows";
  return check(p);
}

void conv(const Conv& a, const Pool& pool) {
  const Matmul& p = a.product;
  if (p.m == 0 || p.n == 0) return;
  // Sums of products of 8-bit codes are exact as floats up to 2^24.
  if (a.groups == a.channels && p.n == a.channels && p.groups == 1 && p.k <= 256) {
    return depthwise(a, pool);
  }
  const int digits = p.inputs == Inputs::kFloat ? 2 : 1;
  Scratch codes(a.batch * a.height * a.width * a.channels * digits);
  std::vector<Grid> grids(a.batch);
  choose_grids(a, pool, grids.data());
  const Image image{codes.as<int8_t>(), grids.data()};
  round_image(a, pool, image, digits);
  for (int64_t g = 0; g < a.groups; g++) {
    Matmul part = p;
    part.first = g * (p.n / a.groups);
    part.last = part.first + p.n / a.groups;
    products(part, Windows(a, image, g), pool);
  }
}

}  // namespace jom
