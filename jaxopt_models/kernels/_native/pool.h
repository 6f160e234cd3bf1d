// Work shared out in blocks, and memory that is used again.
#ifndef JOM_POOL_H_
#define JOM_POOL_H_

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

namespace jom {

// Threads that may help. `schedule` may run its task at once, later or much later.
class Pool {
 public:
  virtual ~Pool() = default;
  virtual int threads() const { return 1; }
  virtual void schedule(std::function<void()> task) const { task(); }

  // Calls f(0), ..., f(n - 1), each once; returns when all have returned.
  //
  // Blocks are claimed from a counter, by the caller too, which waits only for blocks that are
  // running. A task that starts after all are claimed does nothing, so that no caller waits for a
  // thread that waits for it.
  template <typename F>
  void each(int n, F&& f) const {
    int helpers = threads() - 1 < n - 1 ? threads() - 1 : n - 1;
    if (helpers < 1) {
      for (int i = 0; i < n; i++) f(i);
      return;
    }
    struct Shared {
      std::atomic<int> next{0}, done{0};
      int n;
      std::function<void(int)> f;  // Only called while the caller waits for it.
    };
    auto s = std::make_shared<Shared>();
    s->n = n;
    s->f = [&f](int i) { f(i); };
    auto work = [s] {
      for (int i; (i = s->next.fetch_add(1)) < s->n;) {
        s->f(i);
        s->done.fetch_add(1, std::memory_order_release);
      }
    };
    for (int t = 0; t < helpers; t++) schedule(work);
    work();
    for (int spins = 0; s->done.load(std::memory_order_acquire) < n; spins++) {
      if (spins > 4096) {
        std::this_thread::yield();
      } else {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
    }
  }
};

// Calls f(0), ..., f(n - 1) in a few pieces; at once where it is not worth waking a thread.
template <typename F>
void share(const Pool& pool, int64_t n, bool alone, F&& f) {
  const int64_t most = 8 * pool.threads(), pieces = alone ? 1 : n < most ? n : most;
  auto piece = [&](int p) {
    for (int64_t i = n * p / pieces; i < n * (p + 1) / pieces; i++) f(i);
  };
  if (n) pool.each((int)pieces, piece);
}

// Memory for the length of a call. A large fresh allocation costs more in page faults than the
// work done in it, so some is kept.
class Scratch {
 public:
#if JOM_EXACT_SCRATCH
  // As much as was asked for, or AddressSanitizer would not see what is written beyond it.
  explicit Scratch(size_t bytes) {
    if (posix_memalign(&data_, 64, bytes ? bytes : 1)) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
#else
  explicit Scratch(size_t bytes) {
    bytes = (bytes + 4095) & ~size_t{4095};
    {
      std::lock_guard<std::mutex> lock(mutex());
      auto& kept = free_list();
      for (size_t i = 0; i < kept.size(); i++) {
        if (kept[i].second >= bytes && kept[i].second <= 4 * bytes + (1 << 20)) {
          std::tie(data_, bytes_) = kept[i];
          kept[i] = kept.back();
          kept.pop_back();
          return;
        }
      }
    }
    bytes_ = bytes;
    data_ = std::aligned_alloc(4096, bytes ? bytes : 4096);
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() {
    std::lock_guard<std::mutex> lock(mutex());
    auto& kept = free_list();
    if (kept.size() < 8 && bytes_ <= (64u << 20)) {
      kept.emplace_back(data_, bytes_);
    } else {
      std::free(data_);
    }
  }
#endif
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <typename T>
  T* as() const { return static_cast<T*>(data_); }

 private:
  // Never destroyed: a call may still run while the process ends.
  static std::mutex& mutex() {
    static auto* m = new std::mutex;
    return *m;
  }
  static std::vector<std::pair<void*, size_t>>& free_list() {
    static auto* v = new std::vector<std::pair<void*, size_t>>;
    return *v;
  }
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace jom

#endif  // JOM_POOL_H_
