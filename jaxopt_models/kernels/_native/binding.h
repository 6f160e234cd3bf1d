// What all that XLA calls has in common.
#ifndef JOM_BINDING_H_
#define JOM_BINDING_H_

#include "xla/ffi/api/ffi.h"

#include <algorithm>
#include <functional>
#include <string>
#include <utility>

#include "pool.h"

namespace ffi = xla::ffi;

namespace jom {

class XlaPool : public Pool {
 public:
  explicit XlaPool(ffi::ThreadPool pool) : pool_(pool), threads_((int)pool.num_threads()) {}
  int threads() const override { return threads_; }
  void schedule(std::function<void()> task) const override { pool_.Schedule(std::move(task)); }

 private:
  mutable ffi::ThreadPool pool_;
  int threads_;
};

inline ffi::Error wrong(const std::string& what) {
  return ffi::Error::InvalidArgument("jaxopt_models: " + what);
}

inline bool is_bf16(const ffi::AnyBuffer& b) { return b.element_type() == ffi::DataType::BF16; }

inline bool is_real(const ffi::AnyBuffer& b) {
  return is_bf16(b) || b.element_type() == ffi::DataType::F32;
}

// An operand that may be left out is given without entries.
template <typename B>
const float* optional(const B& b) { return b.element_count() ? b.typed_data() : nullptr; }

inline bool same(ffi::Span<const int64_t> a, ffi::Span<const int64_t> b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

}  // namespace jom

#define JOM_EXPORT __attribute__((visibility("default")))

#endif  // JOM_BINDING_H_
