// Products of signs, and convolutions of them.
#include "binary/cpu.h"
#include "driver.h"

namespace {

struct Signs {
  Signs(Random& r, int64_t taps, int64_t channels, int64_t n)
      : words((channels + 31) / 32), panels((n + 63) / 64), taps(taps),
        bits(panels * taps * words * 64), scale(panels * 64) {
    for (size_t i = 0; i < bits.size; i++) {
      // Nothing is set beyond a run; beyond the columns anything may be.
      const int64_t left = channels - (int64_t)i / 64 % (words ? words : 1) * 32;
      bits.data[i] = (uint32_t)r.engine() & (left < 32 ? (1u << left) - 1 : ~0u);
    }
    for (size_t i = 0; i < scale.size; i++) scale.data[i] = (float)(1 + r.upto(30)) / 8.0f;
  }
  int of(int64_t tap, int64_t c, int64_t j) const {
    const uint32_t word = bits.data[((j / 64 * taps + tap) * words + c / 32) * 64 + j % 64];
    return word >> (c % 32) & 1 ? 1 : -1;
  }
  int64_t words, panels, taps;
  Exact<uint32_t> bits;
  Exact<float> scale;
};

void fill(Random& r, jom::Binary& a, const Signs& w, Numbers& x, Results& y) {
  for (size_t i = 0; i < x.wide.size(); i++) {
    if (r.one_in(16)) x.set(i, r.one_in(2) ? 0.0f : -0.0f);
  }
  spoil(r, x);
  a.panels = w.panels, a.words = w.words, a.w = w.bits.data, a.scale = w.scale.data;
  a.x = x.data(), a.x_bf16 = x.bf16, a.y = y.data(), a.y_bf16 = y.bf16;
}

// The inputs of one result: their number, their sum by sign, and that of their magnitudes.
struct Sum {
  void add(float x, int sign) {
    is_nan = is_nan || x != x;
    total += x >= 0 ? sign : -sign;
    size += std::fabs((double)x);
  }
  bool agrees(const jom::Binary& a, const Results& y, int64_t at, float scale) const {
    if (is_nan) return y.is_nan(at, "signs");
    if (!a.scaled) return y.same(at, (float)total * scale, "signs");
    if (!std::isfinite(size)) return y.is_not_finite(at, "signs");
    if (!(a.taps * a.channels)) return y.is_nan(at, "signs");  // the mean of nothing
    const double want = size / (a.taps * a.channels) * total * scale;
    return y.near(at, want, 2e-5 * std::fabs(want) + 1e-30, "signs");
  }
  bool is_nan = false;
  int64_t total = 0;
  double size = 0;
};

}  // namespace

bool binary_product(Random& r) {
  jom::Binary a{};
  a.m = r.extent(40), a.n = r.extent(200), a.taps = r.one_in(3) ? r.upto(4) : 1;
  a.channels = r.one_in(8) ? r.upto(3000) : r.extent(140);
  a.scaled = r.one_in(2);
  if (r.one_in(8)) a.m = 40 + r.upto(300), a.n = r.extent(80);
  Signs w(r, a.taps, a.channels, a.n);
  const int64_t k = a.taps * a.channels;
  Numbers x(r, a.m * k, r.one_in(3));
  Results y(a.m * a.n, r.one_in(3));
  fill(r, a, w, x, y);
  if (const char* what = check(a)) return std::printf("refused: %s\n", what), false;
  binary(a, Threads(r));
  for (int64_t i = 0; i < a.m; i++) {
    for (int64_t j = 0; j < a.n; j++) {
      Sum s;
      for (int64_t c = 0; c < k; c++) {
        s.add(x.wide[i * k + c], w.of(c / a.channels, c % a.channels, j));
      }
      if (!s.agrees(a, y, i * a.n + j, w.scale.data[j])) return false;
    }
  }
  return true;
}

bool binary_convolution(Random& r) {
  jom::Binary a{};
  a.conv = true, a.batch = r.one_in(8) ? 0 : 1 + r.upto(1), a.channels = r.extent(140), a.n = r.extent(100);
  for (int i = 0; i < 2; i++) {
    a.size[i] = r.one_in(4) ? r.upto(20) : 2 + r.upto(7), a.window[i] = 1 + r.upto(3);
    a.stride[i] = 1 + r.upto(2), a.low[i] = r.upto(4) - 1, a.dilation[i] = 1 + r.upto(1);
    const int64_t reach = (a.window[i] - 1) * a.dilation[i] + 1;
    const int64_t left = a.size[i] + a.low[i] + r.upto(4) - 1 - reach;
    a.out[i] = left < 0 ? 0 : left / a.stride[i] + 1;
  }
  a.taps = a.window[0] * a.window[1], a.m = a.batch * a.out[0] * a.out[1], a.scaled = r.one_in(2);
  Signs w(r, a.taps, a.channels, a.n);
  const int64_t pixels = a.size[0] * a.size[1];
  Numbers x(r, a.batch * pixels * a.channels, r.one_in(3));
  Results y(a.m * a.n, r.one_in(3));
  fill(r, a, w, x, y);
  if (const char* what = check(a)) return std::printf("refused: %s\n", what), false;
  binary(a, Threads(r));
  for (int64_t i = 0; i < a.m * a.n; i++) {
    const int64_t row = i / a.n, j = i % a.n;
    Sum s;
    for (int64_t tap = 0; tap < a.taps; tap++) {
      const int64_t down = row / a.out[1] % a.out[0] * a.stride[0] - a.low[0] +
                           tap / a.window[1] * a.dilation[0];
      const int64_t across = row % a.out[1] * a.stride[1] - a.low[1] +
                             tap % a.window[1] * a.dilation[1];
      if (down < 0 || down >= a.size[0] || across < 0 || across >= a.size[1]) continue;
      const int64_t pixel = row / (a.out[0] * a.out[1]) * pixels + down * a.size[1] + across;
      for (int64_t c = 0; c < a.channels; c++) {
        s.add(x.wide[pixel * a.channels + c], w.of(tap, c, j));
      }
    }
    if (!s.agrees(a, y, i, w.scale.data[j])) return false;
  }
  return true;
}
