// Products of the signs of inputs with packed signs; see cpu.cc.
#ifndef JOM_BINARY_CPU_H_
#define JOM_BINARY_CPU_H_

#include <cstdint>

#include "../_native/epilogue.h"
#include "../_native/pool.h"
#include "../_native/signs.h"

namespace jom {

// Signs of weights are packed in panels of 64 columns, [runs * words][64] words of 32 bits. A run
// is what lies next to each other along the last input axis, the channels of a convolution, and
// is filled up to whole words; a set bit is plus one, and those beyond the run are not set.
inline constexpr int kSignPanel = 64, kSignVectors = kSignPanel / kLanes;

struct Binary {
  // A product of rows has a run for each of `taps`; a convolution, a pixel for each.
  int64_t taps, channels;
  int64_t n, panels, words;  // columns, and words of a tap
  const void* x;             // [m, taps * channels], or [batch, height, width, channels]
  bool x_bf16;
  const uint32_t* w;         // [panels, taps * words, 64]
  const float* scale;        // [panels, 64]
  bool scaled;               // by the mean magnitude of the inputs
  void* y;                   // [m, n], float32 or bfloat16
  bool y_bf16;

  int64_t m;                 // rows, or pixels of the result
  bool conv;
  // Of a convolution, by axis: extents, window, stride, padding before, dilation, and the result.
  int64_t batch, size[2], window[2], stride[2], low[2], dilation[2], out[2];
};

// Returns nullptr, or what is wrong with the sizes.
const char* check(const Binary& a);
// Sizes must have been checked.
void binary(const Binary& a, const Pool& pool);

}  // namespace jom

#endif  // JOM_BINARY_CPU_H_
