// Products of rows, and convolutions, with packed integer weights.
#include "conv/cpu.h"
#include "driver_packed.h"

namespace {

// Sizes for one way or another through the schedule.
void choose(Random& r, int64_t& m, int64_t& k, int64_t& n, int64_t& groups) {
  const int kind = r.upto(99);
  groups = 1 + (r.one_in(3) ? r.upto(2) : 0);
  m = r.extent(20), n = r.extent(150), k = r.extent(100);
  if (kind < 30) {  // weights near a core, rows for many pieces
    m = 24 + r.upto(400), n = 1 + r.upto(90), k = 1 + r.upto(150);
  } else if (kind < 40) {  // more rows than stay in the caches
    m = 60 + r.upto(400), n = 1 + r.upto(5), k = 1500 + r.upto(3000);
  } else if (kind < 50) {  // too few tiles for all threads to take whole rows
    m = 6 + r.upto(50), n = 1 + r.upto(70), k = 300 + r.upto(900);
  } else if (kind < 53) {  // weights beyond the cache of a core
    m = 1 + r.upto(40), n = 700 + r.upto(300), k = 1000 + r.upto(300);
  }
  if (k < groups) groups = 1;
  if (groups > 1) k = (k / groups + 31) / 32 * 32 * groups;
}

}  // namespace

bool product(Random& r) {
  int64_t m, k, n, groups;
  choose(r, m, k, n, groups);
  Weights w(r, k, n, groups);
  Numbers x(r, m * k, r.one_in(3));
  for (int64_t i = 0; i < m; i++) {
    // Rows of zeros, of denormal numbers, and of others of any size.
    const float by = r.one_in(20) ? 0.0f : r.one_in(20) ? 1e-40f : std::ldexp(1.0f, r.upto(20) - 10);
    if (r.one_in(3)) {
      for (int64_t c = 0; c < k; c++) x.set(i * k + c, x.wide[i * k + c] * by);
    }
  }
  spoil(r, x);
  Exact<float> bias(r.one_in(2) ? n : 0);
  for (size_t i = 0; i < bias.size; i++) bias.data[i] = r.number();
  jom::Matmul a{};
  fill(r, a, w);
  Results y(m * n, r.one_in(3));
  a.m = m, a.x = x.data(), a.x_bf16 = x.bf16, a.y = y.data(), a.y_bf16 = y.bf16, a.bias = bias.data;
  if (r.one_in(3)) a.first = r.upto((int)n), a.last = a.first + r.upto((int)(n - a.first));
  if (const char* what = check(a)) return std::printf("refused: %s\n", what), false;
  matmul(a, Threads(r));
  std::vector<double> row(k), want(n), off(n);
  for (int64_t i = 0; i < m; i++) {
    const Grid grid(a, x.wide.data() + i * k, k);
    for (int64_t c = 0; c < k; c++) row[c] = grid.finite ? grid.of(x.wide[i * k + c]) : 0;
    for (int64_t j = 0; j < n; j++) {
      want[j] = bias.data ? bias.data[j] : 0, off[j] = 0;
    }
    for (int64_t c = 0; c < k; c++) {
      for (int64_t j = 0; j < n; j++) {
        want[j] += row[c] * w.value[c * n + j];
        off[j] += w.weight[c * n + j];
      }
    }
    for (int64_t j = 0; j < n; j++) {
      const double error = 1.2 * grid.unsure * off[j] + 1e-6 * (1 + std::fabs(want[j]));
      const int64_t at = i * n + j;
      if (j < a.first || j >= a.last ? !y.untouched(at, "product")
          : !grid.finite             ? !y.is_nan(at, "product")
                         : !y.near(at, activated(want[j], a.act), error, "product")) {
        return false;
      }
    }
  }
  return true;
}

bool convolution(Random& r) {
  jom::Conv c{};
  c.batch = r.one_in(8) ? 0 : 1 + r.upto(1);
  c.height = r.one_in(8) ? r.upto(2) : 2 + r.upto(7), c.width = r.one_in(8) ? r.upto(2) : 2 + r.upto(7);
  const int64_t kind = r.upto(2), each = r.extent(20);
  c.groups = kind == 0 ? 1 : 1 + r.upto(4);
  if (kind == 2) c.groups = 1 + r.extent(140);
  c.channels = kind == 2 ? c.groups : c.groups * each;
  const int64_t n = kind == 2 ? c.channels : c.groups * r.extent(40);
  for (int i = 0; i < 2; i++) {
    c.window[i] = 1 + r.upto(3), c.stride[i] = 1 + r.upto(1), c.before[i] = r.upto(3) - 1;
    c.dilation[i] = 1 + r.upto(1);
  }
  if (r.one_in(8)) c.batch = 3, c.height = 8 + r.upto(12), c.width = 8 + r.upto(12);
  auto length = [&](int i, int64_t size) {
    const int64_t reach = (c.window[i] - 1) * c.dilation[i] + 1;
    const int64_t left = size + c.before[i] + r.upto(3) - 1 - reach;
    return left < 0 ? 0 : left / c.stride[i] + 1;
  };
  c.out_height = length(0, c.height), c.out_width = length(1, c.width);
  const int64_t inner = c.channels / c.groups, k = c.window[0] * c.window[1] * inner;
  Weights w(r, k, n, inner % 32 || r.one_in(2) || !inner ? 1 : c.window[0]);
  const int64_t m = c.batch * c.out_height * c.out_width, size = c.height * c.width * c.channels;
  Numbers x(r, c.batch * size, r.one_in(3));
  Results y(m * n, r.one_in(3));
  Exact<float> bias(r.one_in(2) ? n : 0);
  for (size_t i = 0; i < bias.size; i++) bias.data[i] = r.number();
  jom::Matmul& a = c.product;
  fill(r, a, w);
  spoil(r, x);
  a.m = m, a.x = x.data(), a.x_bf16 = x.bf16, a.y = y.data(), a.y_bf16 = y.bf16, a.bias = bias.data;
  if (const char* what = check(c)) return std::printf("refused: %s\n", what), false;
  conv(c, Threads(r));
  // Where channels have windows of their own, inputs that are not rounded reach no others.
  const bool apart = c.groups == c.channels && n == c.channels && a.inputs == jom::Inputs::kFloat;
  for (int64_t row = 0; row < m; row++) {
    const int64_t b = row / (c.out_height * c.out_width), place = row % (c.out_height * c.out_width);
    const float* image = x.wide.data() + b * size;
    const Grid grid(a, image, size);
    for (int64_t o = 0; o < n; o++) {
      double want = bias.data ? bias.data[o] : 0, off = 0;
      bool finite = apart || grid.finite;
      for (int64_t t = 0; t < k; t++) {
        const int64_t i = t / inner / c.window[1], j = t / inner % c.window[1];
        const int64_t py = place / c.out_width * c.stride[0] - c.before[0] + i * c.dilation[0];
        const int64_t px = place % c.out_width * c.stride[1] - c.before[1] + j * c.dilation[1];
        const int64_t channel = o / (n / c.groups) * inner + t % inner;
        off += w.weight[t * n + o];
        if (py < 0 || py >= c.height || px < 0 || px >= c.width) continue;
        const float v = image[(py * c.width + px) * c.channels + channel];
        finite = finite && (std::isfinite(v) || !apart);
        if (finite) want += grid.of(v) * w.value[t * n + o];
      }
      const int64_t at = row * n + o;
      if (!finite) {
        // An activation function may make a number of an infinite one.
        if (!apart ? !y.is_nan(at, "convolution")
                   : a.act == jom::Activation::kNone && !y.is_not_finite(at, "convolution")) {
          return false;
        }
        continue;
      }
      const double unsure = std::isfinite(grid.unsure) ? grid.unsure : 4e-6;
      const double error = 1.2 * unsure * off + 1e-6 * (1 + std::fabs(want));
      if (!y.near(at, activated(want, a.act), error, "convolution")) return false;
    }
  }
  return true;
}
