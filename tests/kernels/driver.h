// What the drivers of all kernels share: random numbers, exact buffers, threads, and comparisons.
#ifndef JOM_TESTS_DRIVER_H_
#define JOM_TESTS_DRIVER_H_

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "_native/epilogue.h"
#include "_native/pool.h"

struct Random {
  std::mt19937 engine;
  int upto(int n) { return (int)(engine() % (unsigned)(n + 1)); }
  bool one_in(int n) { return upto(n - 1) == 0; }
  float number() { return (float)((int)(engine() % 2001) - 1000) / 250.0f; }
  // Often what goes wrong: nothing, one, and the neighbours of whole vectors and panels.
  int extent(int n) {
    static const int edges[] = {0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65};
    return std::min(n, one_in(2) ? edges[upto(12)] : upto(n));
  }
};

// Tasks run at once, on threads of their own at any time, or not before the end of the call.
class Threads : public jom::Pool {
 public:
  explicit Threads(Random& r) : threads_(1 + r.upto(4)), late_(r.one_in(4)), now_(r.one_in(4)) {}
  int threads() const override { return threads_; }
  void schedule(std::function<void()> task) const override {
    if (now_) return task();
    late_ ? waiting_.push_back(std::move(task)) : (void)running_.emplace_back(std::move(task));
  }
  ~Threads() override {
    for (auto& task : waiting_) task();
    for (auto& t : running_) t.join();
  }

 private:
  int threads_;
  bool late_, now_;
  mutable std::vector<std::thread> running_;
  mutable std::vector<std::function<void()>> waiting_;
};

// Exactly as long as it has to be, null where it is nothing, aligned no more than its type is.
template <typename T>
struct Exact {
  explicit Exact(size_t n) : memory(n ? std::malloc((n + 1) * sizeof(T)) : nullptr), size(n) {
    data = n ? (T*)memory + 1 : nullptr;
  }
  ~Exact() { std::free(memory); }
  Exact(const Exact&) = delete;
  void* memory;
  T* data;
  size_t size;
};

// Numbers in float32 or bfloat16, and what they are.
struct Numbers {
  Numbers(Random& r, int64_t n, bool bf16) : bf16(bf16), wide(n), floats(bf16 ? 0 : n), halves(bf16 ? n : 0) {
    for (int64_t i = 0; i < n; i++) set(i, r.number());
  }
  void set(int64_t i, float x) {
    if (bf16) {
      halves.data[i] = jom::to_bf16(x);
      x = jom::from_bf16(halves.data[i]);
    } else {
      floats.data[i] = x;
    }
    wide[i] = x;
  }
  const void* data() const { return bf16 ? (const void*)halves.data : floats.data; }
  bool bf16;
  std::vector<float> wide;
  Exact<float> floats;
  Exact<uint16_t> halves;
};

// Makes an input here and there what a product has to answer with NaN; returns how many.
inline int spoil(Random& r, Numbers& x) {
  const float bad[] = {std::nanf(""), -std::nanf(""), HUGE_VALF, -HUGE_VALF};
  const int n = x.wide.empty() || !r.one_in(3) ? 0 : 1 + r.upto(2);
  for (int i = 0; i < n; i++) x.set(r.upto((int)x.wide.size() - 1), bad[r.upto(3)]);
  return n;
}

// Results, of which none may be written that is not asked for.
struct Results {
  static constexpr float kUntouched = -77.0f;
  Results(int64_t n, bool bf16) : bf16(bf16), floats(bf16 ? 0 : n), halves(bf16 ? n : 0) {
    for (int64_t i = 0; i < n; i++) {
      bf16 ? (void)(halves.data[i] = jom::to_bf16(kUntouched)) : (void)(floats.data[i] = kUntouched);
    }
  }
  void* data() { return bf16 ? (void*)halves.data : floats.data; }
  float at(int64_t i) const { return bf16 ? jom::from_bf16(halves.data[i]) : floats.data[i]; }

  bool untouched(int64_t i, const char* what) const {
    return at(i) == kUntouched || (std::printf("%s: %g was written at %d\n", what, at(i), (int)i), false);
  }
  bool is_nan(int64_t i, const char* what) const {
    return at(i) != at(i) || (std::printf("%s: %g, not NaN at %d\n", what, at(i), (int)i), false);
  }
  bool is_not_finite(int64_t i, const char* what) const {
    return !std::isfinite(at(i)) || (std::printf("%s: finite at %d\n", what, (int)i), false);
  }
  bool near(int64_t i, double want, double error, const char* what) const {
    if (bf16) error += std::fabs(want) / 255;
    if (std::fabs(at(i) - want) <= error) return true;
    std::printf("%s: %.9g, not %.9g within %g, at %d\n", what, at(i), want, error, (int)i);
    return false;
  }
  bool same(int64_t i, float want, const char* what) const {
    if (bf16) want = jom::from_bf16(jom::to_bf16(want));
    return at(i) == want || (std::printf("%s: %.9g, not %.9g\n", what, at(i), want), false);
  }
  bool bf16;
  Exact<float> floats;
  Exact<uint16_t> halves;
};

// One random case each; false, and a line that says what is wrong.
bool product(Random& r);
bool convolution(Random& r);
bool binary_product(Random& r);
bool binary_convolution(Random& r);
bool sparse_blocks(Random& r);
bool sparse_pairs(Random& r);

#endif  // JOM_TESTS_DRIVER_H_
