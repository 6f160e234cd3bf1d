// What XLA calls for products of signs: extents are checked here, work is done in ../binary.
#include "binding.h"

#include "../binary/cpu.h"

namespace jom {
namespace {

using Signs = ffi::BufferR3<ffi::U32>;
using Scales = ffi::BufferR2<ffi::F32>;

// Takes over all that has no axes of its own in `a`, checks the rest, and runs.
ffi::Error run_binary(Binary& a, const char* who, ffi::ThreadPool pool, const ffi::AnyBuffer& x,
                      const Signs& w, const Scales& scale, ffi::Result<ffi::AnyBuffer>& y,
                      int64_t scaled) {
  const std::string name = std::string(who) + ": ";
  auto wd = w.dimensions(), sd = scale.dimensions();
  if (!is_real(x) || !is_real(*y)) return wrong(name + "inputs and outputs are float32 or bfloat16");
  a.words = (a.channels + kWord - 1) / kWord;
  if (wd[1] != a.taps * a.words || wd[2] != kSignPanel) {
    return wrong(name + "signs are not [panels, words, 64]");
  }
  if (sd[0] != wd[0] || sd[1] != kSignPanel) return wrong(name + "scales are not [panels, 64]");
  a.panels = wd[0];
  a.w = w.typed_data(), a.scale = scale.typed_data(), a.scaled = scaled;
  a.x = x.untyped_data(), a.x_bf16 = is_bf16(x);
  a.y = y->untyped_data(), a.y_bf16 = is_bf16(*y);
  if (const char* what = check(a)) return wrong(name + what);
  binary(a, XlaPool(pool));
  return ffi::Error::Success();
}

ffi::Error run_binary_matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, Signs w, Scales scale,
                             ffi::Result<ffi::AnyBuffer> y, int64_t runs, int64_t length,
                             int64_t scaled) {
  auto xd = x.dimensions(), yd = y->dimensions();
  if (xd.size() != 2 || yd.size() != 2 || xd[0] != yd[0] || runs < 0 || length < 0 ||
      xd[1] != runs * length) {
    return wrong("binary matmul: x is not [m, runs * length], or y not [m, n]");
  }
  Binary a{};
  a.m = xd[0], a.n = yd[1], a.taps = runs, a.channels = length;
  return run_binary(a, "binary matmul", pool, x, w, scale, y, scaled);
}

ffi::Error run_binary_conv(ffi::ThreadPool pool, ffi::AnyBuffer x, Signs w, Scales scale,
                           ffi::Result<ffi::AnyBuffer> y, ffi::Span<const int64_t> geometry,
                           int64_t scaled) {
  auto xd = x.dimensions(), yd = y->dimensions();
  if (xd.size() != 4 || yd.size() != 4 || xd[0] != yd[0]) {
    return wrong("binary conv: x and y are not [batch, height, width, channels]");
  }
  if (geometry.size() != 8) {
    return wrong("binary conv: geometry is not window, strides, padding, dilation");
  }
  Binary a{};
  a.conv = true, a.batch = xd[0], a.channels = xd[3], a.n = yd[3];
  for (int i = 0; i < 2; i++) {
    a.size[i] = xd[1 + i], a.out[i] = yd[1 + i], a.window[i] = geometry[i];
    a.stride[i] = geometry[2 + i], a.low[i] = geometry[4 + i], a.dilation[i] = geometry[6 + i];
  }
  a.taps = a.window[0] * a.window[1], a.m = a.batch * a.out[0] * a.out[1];
  return run_binary(a, "binary conv", pool, x, w, scale, y, scaled);
}

}  // namespace
}  // namespace jom

extern "C" JOM_EXPORT XLA_FFI_Error* jom_binary_matmul(XLA_FFI_CallFrame*);
extern "C" JOM_EXPORT XLA_FFI_Error* jom_binary_conv(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jom_binary_matmul, jom::run_binary_matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<jom::Signs>()
                                  .Arg<jom::Scales>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("runs")
                                  .Attr<int64_t>("length")
                                  .Attr<int64_t>("scaled"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jom_binary_conv, jom::run_binary_conv,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<jom::Signs>()
                                  .Arg<jom::Scales>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<ffi::Span<const int64_t>>("geometry")
                                  .Attr<int64_t>("scaled"));
