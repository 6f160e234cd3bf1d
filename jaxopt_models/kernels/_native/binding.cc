// What XLA calls: extents are checked here, work is done in the kernels beside.
#include "binding.h"

#include "../matmul/cpu.h"

namespace jom {
namespace {

ffi::Error run_matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::BufferR4<ffi::U8> w,
                      ffi::BufferR4<ffi::F32> scale, ffi::BufferR4<ffi::F32> zero,
                      ffi::BufferR4<ffi::F32> sums, ffi::BufferR1<ffi::F32> bias,
                      ffi::BufferR2<ffi::F32> grid, ffi::BufferR0<ffi::S32> index,
                      ffi::Result<ffi::AnyBuffer> y, int64_t bits, int64_t inputs, int64_t input_bits,
                      int64_t symmetric, int64_t activation) {
  if (!is_real(x) || !is_real(*y)) return wrong("matmul: inputs and outputs are float32 or bfloat16");
  auto xd = x.dimensions(), yd = y->dimensions(), wd = w.dimensions(), sd = scale.dimensions();
  if (xd.size() != 2 || yd.size() != 2 || xd[0] != yd[0]) return wrong("matmul: x is not [m, k], or y not [m, n]");
  if (wd[3] != bits * 256) return wrong("matmul: weights are not [layers, panels, chunks, 256 bits]");
  if (sd[0] != wd[0] || sd[1] != wd[1] || sd[3] != 64) return wrong("matmul: scales are not [layers, panels, groups, 64]");
  for (auto* b : {&zero, &sums}) {
    if (b->element_count() && !same(b->dimensions(), sd)) return wrong("matmul: zero points or sums differ from the scales in shape");
  }
  if (bias.element_count() && bias.dimensions()[0] != yd[1]) return wrong("matmul: bias is not [n]");
  const int64_t layers = wd[0];
  if (layers < 1) return wrong("matmul: there is no layer");
  auto gd = grid.dimensions();
  if (inputs == (int64_t)Inputs::kStatic && (gd[0] != layers || gd[1] != 2)) {
    return wrong("matmul: the grid of the inputs is not [layers, 2]");
  }
  // As JAX does, an index beyond the stack is moved to its end.
  const int64_t layer = std::min<int64_t>(std::max<int64_t>(*index.typed_data(), 0), layers - 1);
  const int64_t per = sd[1] * sd[2] * 64;
  Matmul a{};
  a.m = xd[0], a.k = xd[1], a.n = yd[1];
  a.panels = wd[1], a.chunks = wd[2], a.groups = sd[2], a.bits = (int)bits;
  a.first = 0, a.last = a.n;
  a.x = x.untyped_data(), a.x_bf16 = is_bf16(x);
  a.w = w.typed_data() + layer * wd[1] * wd[2] * wd[3];
  a.scale = scale.typed_data() + layer * per;
  a.zero = optional(zero) ? zero.typed_data() + layer * per : nullptr;
  a.sums = optional(sums) ? sums.typed_data() + layer * per : nullptr;
  a.bias = optional(bias);
  a.inputs = (Inputs)inputs, a.input_bits = (int)input_bits;
  a.input_symmetric = symmetric;
  if (a.inputs == Inputs::kStatic) {
    a.input_scale = grid.typed_data()[2 * layer], a.input_zero = grid.typed_data()[2 * layer + 1];
  }
  a.act = (Activation)activation;
  a.y = y->untyped_data(), a.y_bf16 = is_bf16(*y);
  if (const char* what = check(a)) return wrong(std::string("matmul: ") + what);
  matmul(a, XlaPool(pool));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jom

extern "C" JOM_EXPORT XLA_FFI_Error* jom_matmul(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jom_matmul, jom::run_matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR4<ffi::U8>>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Arg<ffi::BufferR1<ffi::F32>>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("inputs")
                                  .Attr<int64_t>("input_bits")
                                  .Attr<int64_t>("symmetric")
                                  .Attr<int64_t>("activation"));

extern "C" {
// 1000 times the major version of the interface, plus the minor one.
JOM_EXPORT int jom_ffi_api() { return 1000 * XLA_FFI_API_MAJOR + XLA_FFI_API_MINOR; }
JOM_EXPORT const char* jom_isa() { return jom::kIsa; }
}
