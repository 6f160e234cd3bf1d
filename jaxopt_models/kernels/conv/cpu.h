// Convolutions with packed integer weights; see cpu.cc.
#ifndef JOM_CONV_CPU_H_
#define JOM_CONV_CPU_H_

#include "../matmul/cpu.h"

namespace jom {

// Images are [batch, height, width, channels], weights the packed matrix of
// [window height, window width, channels / groups, outputs].
struct Conv {
  int64_t batch, height, width, channels;
  int64_t out_height, out_width;
  int64_t window[2], stride[2], before[2], dilation[2];  // by axis; `before` is padding
  int64_t groups;
  // m, k and n are those of one group of channels: m = batch x out_height x out_width. Inputs are
  // rounded a whole example at a time, where they are not rounded by a fixed grid.
  Matmul product;
};

// Returns nullptr, or what is wrong with the sizes.
const char* check(const Conv& a);
void conv(const Conv& a, const Pool& pool);

}  // namespace jom

#endif  // JOM_CONV_CPU_H_
