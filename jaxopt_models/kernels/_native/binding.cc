// What XLA calls: extents are checked here, work is done in the kernels beside.
#include "binding.h"

#include "../conv/cpu.h"
#include "../matmul/cpu.h"

namespace jom {
namespace {

using Floats1 = ffi::BufferR1<ffi::F32>;
using Floats2 = ffi::BufferR2<ffi::F32>;
using Floats4 = ffi::BufferR4<ffi::F32>;

// Where the part of one layer starts; what all layers share is given once.
template <typename B>
auto* of_layer(const B& b, int64_t layer, int64_t layers) {
  const int64_t own = b.dimensions()[0] == layers ? layer : 0;
  return b.typed_data() + own * (b.element_count() / b.dimensions()[0]);
}

// Takes over weights, and how inputs are rounded; returns nullptr, or what is wrong.
const char* take_packed(Matmul& a, const ffi::BufferR4<ffi::U8>& w, const Floats4& scale,
                        const Floats4& zero, const Floats4& sums, const Floats2& table,
                        const Floats1& bias,
                        const Floats2& grid, const ffi::BufferR0<ffi::S32>& index) {
  auto wd = w.dimensions(), sd = scale.dimensions(), gd = grid.dimensions();
  const int64_t layers = wd[0];
  if (layers < 1) return "there is no layer";
  if (wd[3] != a.bits * 256) return "weights are not [layers, panels, chunks, 256 bits]";
  if ((sd[0] != layers && sd[0] != 1) || sd[1] != wd[1] || sd[3] != kPanel) {
    return "scales are not [layers, panels, groups, 64]";
  }
  for (auto* b : {&zero, &sums}) {
    if (b->element_count() && !same(b->dimensions(), sd)) {
      return "zero points or sums differ from the scales in shape";
    }
  }
  auto td = table.dimensions();
  if (table.element_count() && ((td[0] != layers && td[0] != 1) || td[1] != 16)) {
    return "the table is not [layers, 16]";
  }
  if (bias.element_count() && bias.dimensions()[0] != a.n) return "bias is not [n]";
  const bool fixed = a.inputs == Inputs::kStatic;
  if (fixed && ((gd[0] != layers && gd[0] != 1) || gd[1] != 2)) {
    return "the grid of the inputs is not [layers, 2]";
  }
  // As JAX does, an index beyond the stack is moved to its end.
  const int64_t layer = std::min<int64_t>(std::max<int64_t>(*index.typed_data(), 0), layers - 1);
  a.panels = wd[1], a.chunks = wd[2], a.groups = sd[2];
  a.first = 0, a.last = a.n;
  a.w = of_layer(w, layer, layers);
  a.scale = of_layer(scale, layer, layers);
  a.zero = zero.element_count() ? of_layer(zero, layer, layers) : nullptr;
  a.sums = sums.element_count() ? of_layer(sums, layer, layers) : nullptr;
  a.table = table.element_count() ? of_layer(table, layer, layers) : nullptr;
  a.bias = optional(bias);
  if (fixed) a.input_scale = of_layer(grid, layer, layers)[0];
  if (fixed) a.input_zero = of_layer(grid, layer, layers)[1];
  return nullptr;
}

// The options that products and convolutions share.
struct Options {
  int64_t bits, inputs, input_bits, symmetric, activation;

  void apply(Matmul& a, const ffi::AnyBuffer& x, ffi::Result<ffi::AnyBuffer>& y) const {
    a.bits = (int)bits, a.inputs = (Inputs)inputs, a.input_bits = (int)input_bits;
    a.input_symmetric = symmetric, a.act = (Activation)activation;
    a.x = x.untyped_data(), a.x_bf16 = is_bf16(x);
    a.y = y->untyped_data(), a.y_bf16 = is_bf16(*y);
  }
};

ffi::Error run_matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::BufferR4<ffi::U8> w,
                      Floats4 scale, Floats4 zero, Floats4 sums, Floats2 table, Floats1 bias,
                      Floats2 grid, ffi::BufferR0<ffi::S32> index, ffi::Result<ffi::AnyBuffer> y, int64_t bits,
                      int64_t inputs, int64_t input_bits, int64_t symmetric, int64_t activation) {
  auto xd = x.dimensions(), yd = y->dimensions();
  if (!is_real(x) || !is_real(*y)) return wrong("matmul: only float32 and bfloat16");
  if (xd.size() != 2 || yd.size() != 2 || xd[0] != yd[0]) {
    return wrong("matmul: x is not [m, k], or y not [m, n]");
  }
  Matmul a{};
  a.m = xd[0], a.k = xd[1], a.n = yd[1];
  Options{bits, inputs, input_bits, symmetric, activation}.apply(a, x, y);
  const char* what = take_packed(a, w, scale, zero, sums, table, bias, grid, index);
  if (!what) what = check(a);
  if (what) return wrong(std::string("matmul: ") + what);
  matmul(a, XlaPool(pool));
  return ffi::Error::Success();
}

ffi::Error run_conv(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::BufferR4<ffi::U8> w, Floats4 scale,
                    Floats4 zero, Floats4 sums, Floats2 table, Floats1 bias, Floats2 grid,
                    ffi::BufferR0<ffi::S32> index, ffi::Result<ffi::AnyBuffer> y, int64_t bits,
                    int64_t inputs, int64_t input_bits, int64_t symmetric, int64_t activation,
                    ffi::Span<const int64_t> geometry) {
  auto xd = x.dimensions(), yd = y->dimensions();
  if (!is_real(x) || !is_real(*y)) return wrong("conv: only float32 and bfloat16");
  if (xd.size() != 4 || yd.size() != 4 || xd[0] != yd[0]) {
    return wrong("conv: x or y is not [batch, height, width, channels]");
  }
  if (geometry.size() != 9) return wrong("conv: geometry is not nine numbers");
  const int64_t* g = geometry.begin();
  Conv c{xd[0], xd[1], xd[2], xd[3], yd[1], yd[2], {g[0], g[1]}, {g[2], g[3]}, {g[4], g[5]},
         {g[6], g[7]}, g[8], {}};
  if (c.groups < 1) return wrong("conv: groups do not divide");
  Matmul& a = c.product;
  a.m = yd[0] * yd[1] * yd[2], a.k = g[0] * g[1] * (xd[3] / c.groups), a.n = yd[3];
  Options{bits, inputs, input_bits, symmetric, activation}.apply(a, x, y);
  const char* what = take_packed(a, w, scale, zero, sums, table, bias, grid, index);
  if (!what) what = check(c);
  if (what) return wrong(std::string("conv: ") + what);
  conv(c, XlaPool(pool));
  return ffi::Error::Success();
}

auto packed_binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::BufferR4<ffi::U8>>()
      .Arg<Floats4>()
      .Arg<Floats4>()
      .Arg<Floats4>()
      .Arg<Floats2>()
      .Arg<Floats1>()
      .Arg<Floats2>()
      .Arg<ffi::BufferR0<ffi::S32>>()
      .Ret<ffi::AnyBuffer>()
      .Attr<int64_t>("bits")
      .Attr<int64_t>("inputs")
      .Attr<int64_t>("input_bits")
      .Attr<int64_t>("symmetric")
      .Attr<int64_t>("activation");
}

}  // namespace
}  // namespace jom

extern "C" {
JOM_EXPORT XLA_FFI_Error* jom_matmul(XLA_FFI_CallFrame*);
JOM_EXPORT XLA_FFI_Error* jom_conv(XLA_FFI_CallFrame*);
// 1000 times the major version of the interface, plus the minor one.
JOM_EXPORT int jom_ffi_api() { return 1000 * XLA_FFI_API_MAJOR + XLA_FFI_API_MINOR; }
JOM_EXPORT const char* jom_isa() { return jom::kIsa; }
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(jom_matmul, jom::run_matmul, jom::packed_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jom_conv, jom::run_conv,
    jom::packed_binding().Attr<ffi::Span<const int64_t>>("geometry"));
