// Runs kernels on random sizes and compares them with plain loops: for the sanitizers, no XLA here.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "conv/cpu.h"
#include "matmul/cpu.h"

namespace {

using jom::Inputs;

// Every task on a thread of its own, at any time: what races, a sanitizer sees.
class Threads : public jom::Pool {
 public:
  int threads() const override { return 3; }
  void schedule(std::function<void()> task) const override { threads_.emplace_back(std::move(task)); }
  ~Threads() override {
    for (auto& t : threads_) t.join();
  }

 private:
  mutable std::vector<std::thread> threads_;
};

struct Random {
  std::mt19937 engine;
  int upto(int n) { return (int)(engine() % (unsigned)(n + 1)); }
  float number() { return (float)((int)(engine() % 2001) - 1000) / 250.0f; }
};

// Exactly as long as it has to be, at an odd address where bytes may be anywhere.
template <typename T>
struct Exact {
  explicit Exact(size_t n, size_t shift = 0)
      : memory(std::malloc(n * sizeof(T) + shift)), data((T*)((char*)memory + shift)) {}
  ~Exact() { std::free(memory); }
  Exact(const Exact&) = delete;
  void* memory;
  T* data;
};

struct Weights {
  Weights(Random& r, int64_t k, int64_t n, int64_t groups, int bits, bool with_zero)
      : panels((n + 63) / 64), chunks((k + 31) / 32), groups(groups), bits(bits), k(k), n(n),
        bytes(panels * chunks * 256 * bits, 1), scale(panels * groups * 64),
        zero(panels * groups * 64), sums(panels * groups * 64), with_zero(with_zero) {
    for (int64_t i = 0; i < panels * chunks * 256 * bits; i++) bytes.data[i] = (uint8_t)r.engine();
    for (int64_t i = 0; i < panels * groups * 64; i++) {
      scale.data[i] = (float)(1 + r.upto(7)) / 8.0f;
      zero.data[i] = with_zero ? (float)(r.upto(4) - 2) : 0.0f;
      sums.data[i] = 0.0f;
    }
    // Beyond the matrix codes are the offset, so that they are nothing.
    for (int64_t i = 0; i < chunks * 32; i++) {
      for (int64_t j = 0; j < panels * 64; j++) {
        if (i >= k || j >= n) set(i, j, 1 << (bits - 1));
        if (i < k && j < n) sums.data[side(i, j)] += (float)(code(i, j)) - zero.data[side(i, j)];
      }
    }
  }
  int64_t side(int64_t i, int64_t j) const {
    const int64_t g = groups == 1 ? 0 : i / (k / groups);
    return (j / 64 * groups + g) * 64 + j % 64;
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
    return q - (1 << (bits - 1));
  }
  double value(int64_t i, int64_t j) const {
    return (code(i, j) - zero.data[side(i, j)]) * scale.data[side(i, j)];
  }
  int64_t panels, chunks, groups;
  int bits;
  int64_t k, n;
  Exact<uint8_t> bytes;
  Exact<float> scale, zero, sums;
  bool with_zero;
};

void fill(jom::Matmul& a, const Weights& w, Inputs inputs) {
  a.n = w.n, a.k = w.k, a.panels = w.panels, a.chunks = w.chunks, a.groups = w.groups;
  a.first = 0, a.last = a.n, a.bits = w.bits, a.w = w.bytes.data, a.scale = w.scale.data;
  a.zero = w.with_zero ? w.zero.data : nullptr;
  a.inputs = inputs, a.input_bits = 8, a.input_symmetric = inputs != Inputs::kRowPair;
  a.sums = inputs == Inputs::kRowPair ? w.sums.data : nullptr;
  a.input_scale = 0.05f;
}

bool near(double got, double want, double size, const char* what) {
  if (std::fabs(got - want) <= 0.02 * size + 1e-4) return true;
  std::printf("%s: %g, not %g (size %g)\n", what, got, want, size);
  return false;
}

bool product(Random& r) {
  static const int widths[] = {1, 2, 3, 4, 8};
  const int64_t m = r.upto(20), n = r.upto(150), groups = 1 + r.upto(2);
  const int64_t k = groups > 1 ? 32 * groups * (1 + r.upto(2)) : r.upto(100);
  Weights w(r, k, n, groups, widths[r.upto(4)], r.upto(1));
  Exact<float> x(m * k), y(m * n), bias(n);
  for (int64_t i = 0; i < m * k; i++) x.data[i] = r.number();
  for (int64_t i = 0; i < n; i++) bias.data[i] = r.number();
  jom::Matmul a{};
  a.m = m, a.x = x.data, a.y = y.data, a.bias = bias.data;
  fill(a, w, (Inputs)r.upto(3));
  if (const char* what = check(a)) return std::printf("refused: %s\n", what), false;
  matmul(a, Threads());
  for (int64_t i = 0; i < m; i++) {
    for (int64_t j = 0; j < n; j++) {
      double want = bias.data[j], size = 1;
      for (int64_t c = 0; c < k; c++) {
        want += x.data[i * k + c] * w.value(c, j);
        size += std::fabs(4 * w.value(c, j));
      }
      if (!near(y.data[i * n + j], want, size, "product")) return false;
    }
  }
  return true;
}

bool convolution(Random& r) {
  static const int widths[] = {1, 2, 3, 4, 8};
  jom::Conv c{};
  c.batch = r.upto(2), c.height = 1 + r.upto(7), c.width = 1 + r.upto(7);
  const int64_t kind = r.upto(2), each = 1 + r.upto(20);
  c.groups = kind == 0 ? 1 : 1 + r.upto(4);
  c.channels = kind == 2 ? c.groups : c.groups * each;
  const int64_t n = kind == 2 ? c.channels : c.groups * (1 + r.upto(40));
  for (int i = 0; i < 2; i++) {
    c.window[i] = 1 + r.upto(3), c.stride[i] = 1 + r.upto(1), c.before[i] = r.upto(2);
    c.dilation[i] = 1 + r.upto(1);
  }
  auto length = [&](int i, int64_t size) {
    const int64_t reach = (c.window[i] - 1) * c.dilation[i] + 1;
    const int64_t left = size + 2 * c.before[i] - reach;
    return left < 0 ? 0 : left / c.stride[i] + 1;
  };
  c.out_height = length(0, c.height), c.out_width = length(1, c.width);
  const int64_t inner = c.channels / c.groups, k = c.window[0] * c.window[1] * inner;
  Weights w(r, k, n, 1, widths[r.upto(4)], r.upto(1));
  const int64_t m = c.batch * c.out_height * c.out_width;
  Exact<float> x(c.batch * c.height * c.width * c.channels), y(m * n);
  for (int64_t i = 0; i < c.batch * c.height * c.width * c.channels; i++) x.data[i] = r.number();
  jom::Matmul& a = c.product;
  a.m = m, a.x = x.data, a.y = y.data;
  fill(a, w, (Inputs)r.upto(3));
  if (const char* what = check(c)) return std::printf("refused: %s\n", what), false;
  conv(c, Threads());
  for (int64_t row = 0; row < m; row++) {
    const int64_t b = row / (c.out_height * c.out_width), place = row % (c.out_height * c.out_width);
    for (int64_t o = 0; o < n; o++) {
      double want = 0, size = 1;
      for (int64_t t = 0; t < k; t++) {
        const int64_t i = t / inner / c.window[1], j = t / inner % c.window[1];
        const int64_t py = place / c.out_width * c.stride[0] - c.before[0] + i * c.dilation[0];
        const int64_t px = place % c.out_width * c.stride[1] - c.before[1] + j * c.dilation[1];
        const int64_t channel = o / (n / c.groups) * inner + t % inner;
        size += std::fabs(4 * w.value(t, o));
        if (py < 0 || py >= c.height || px < 0 || px >= c.width) continue;
        want += x.data[((b * c.height + py) * c.width + px) * c.channels + channel] * w.value(t, o);
      }
      if (!near(y.data[row * n + o], want, size, "convolution")) return false;
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 1000;
  for (int i = 0; i < count; i++) {
    Random r{std::mt19937((unsigned)i)};
    if (!(i % 2 ? convolution(r) : product(r))) {
      std::printf("failed at case %d on %s\n", i, jom::kIsa);
      return 1;
    }
  }
  std::printf("%d cases on %s\n", count, jom::kIsa);
}
