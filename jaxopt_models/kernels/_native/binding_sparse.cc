// What XLA calls for products with what is kept: extents are checked here, work is in ../sparse.
#include "binding.h"

#include "../sparse/cpu.h"

namespace jom {
namespace {

// Takes over rows, values and the result; returns nullptr, or what is wrong.
const char* take_rows(Rows& a, const ffi::AnyBuffer& x, const ffi::AnyBuffer& values,
                      ffi::Result<ffi::AnyBuffer>& y) {
  auto xd = x.dimensions(), yd = y->dimensions();
  if (!is_real(x) || !is_real(*y)) return "inputs and outputs are float32 or bfloat16";
  if (xd.size() != 2 || yd.size() != 2 || xd[0] != yd[0]) return "x is not [m, k], or y not [m, n]";
  a.m = xd[0], a.k = xd[1], a.n = yd[1];
  a.x = x.untyped_data(), a.x_bf16 = is_bf16(x);
  a.y = y->untyped_data(), a.y_bf16 = is_bf16(*y);
  a.values = values.untyped_data();
  const bool codes = values.element_type() == ffi::DataType::S8;
  if (!codes && !is_real(values)) return "values are float32, bfloat16 or int8";
  a.kind = codes ? Kind::kInt8 : is_bf16(values) ? Kind::kBf16 : Kind::kFloat;
  return nullptr;
}

ffi::Error run_blocks(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer values,
                      ffi::BufferR1<ffi::U16> index, ffi::BufferR1<ffi::S32> starts,
                      ffi::BufferR1<ffi::F32> scale, ffi::Result<ffi::AnyBuffer> y) {
  const std::string name = "sparse blocks: ";
  Blocks a{};
  if (const char* what = take_rows(a, x, values, y)) return wrong(name + what);
  auto vd = values.dimensions();
  if (vd.size() != 2 || index.dimensions()[0] != vd[0]) {
    return wrong(name + "values are not [units, unit], or indices not [units]");
  }
  if (starts.dimensions()[0] != a.n + 1) return wrong(name + "starts are not [n + 1]");
  if (scale.element_count() && scale.dimensions()[0] != a.n) return wrong(name + "scale is not [n]");
  a.units = vd[0], a.unit = (int)vd[1];
  a.index = index.typed_data(), a.starts = starts.typed_data(), a.scale = optional(scale);
  if (const char* what = check(a)) return wrong(name + what);
  blocks(a, XlaPool(pool));
  return ffi::Error::Success();
}

ffi::Error run_pairs(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer values,
                     ffi::BufferR3<ffi::U32> places, ffi::Result<ffi::AnyBuffer> y) {
  const std::string name = "sparse pairs: ";
  Pairs a{};
  if (const char* what = take_rows(a, x, values, y)) return wrong(name + what);
  auto vd = values.dimensions(), pd = places.dimensions();
  if (vd.size() != 5 || vd[2] != kRunsOfWord || vd[3] != 2 || vd[4] != kLanes) {
    return wrong(name + "values are not [panels, chunks, 8, 2, 16]");
  }
  if (pd[0] != vd[0] || pd[1] != vd[1] || pd[2] != kLanes) {
    return wrong(name + "places are not [panels, chunks, 16]");
  }
  a.panels = vd[0], a.chunks = vd[1], a.places = places.typed_data();
  if (const char* what = check(a)) return wrong(name + what);
  pairs(a, XlaPool(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jom

extern "C" JOM_EXPORT XLA_FFI_Error* jom_sparse_blocks(XLA_FFI_CallFrame*);
extern "C" JOM_EXPORT XLA_FFI_Error* jom_sparse_pairs(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jom_sparse_blocks, jom::run_blocks,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR1<ffi::U16>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR1<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jom_sparse_pairs, jom::run_pairs,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR3<ffi::U32>>()
                                  .Ret<ffi::AnyBuffer>());
