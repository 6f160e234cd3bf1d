// Convolutions with packed integer weights.
//
// A convolution is a product of the windows of an image with a matrix. Images are rounded once, to
// the codes that `matmul` takes; windows are put together for a few rows at a time, in the order in
// which tiles read them.
#include "cpu.h"

#include "depthwise.h"
#include "image.h"

namespace jom {
namespace {

// An image as signed bytes, a plane for each digit; an example has one grid.
struct Image {
  int8_t* codes;      // [digit][batch, height, width, channels]
  const Grid* grids;  // [batch]
};

void round_image(const Conv& a, const Pool& pool, const Image& to, int digits) {
  const int64_t size = a.height * a.width * a.channels, plane = a.batch * size;
  each_piece(a, pool, [&](int64_t example, int64_t start, int64_t n, const float* x) {
    int8_t* q = to.codes + example * size + start;
    if (digits == 1) {
      to_codes(x, n, to.grids[example], q);
    } else {
      int32_t unused[2];
      to_digits(x, n, to.grids[example].scale, q, q + plane, unused);
    }
  });
}

// The windows of one group of channels as rows of a product.
class Windows {
 public:
  Windows(const Conv& a, const Image& image, int64_t group)
      : a_(a), image_(image), each_(a.channels / a.groups), first_(group * each_) {}

  void operator()(int64_t row, int height, const Rounded& to) const {
    const int64_t padded = a_.product.chunks * kChunk, plane = a_.batch * size();
    Scratch line(padded);
    int8_t* q = line.as<int8_t>();
    std::memset(q, 0, padded);
    for (int r = 0; r < height; r++) {
      const int64_t example = (row + r) / (a_.out_height * a_.out_width);
      const Grid& g = image_.grids[example];
      to.zeros[r] = g.zero;
      for (int64_t s = 0; s < to.segments; s++) to.scales[r * to.segments + s] = g.scale;
      for (int d = 0; d < to.digits; d++) {
        gather(image_.codes + d * plane + example * size(), row + r, (int8_t)(int32_t)g.zero, q);
        int32_t* totals = to.totals + r * to.segments * to.digits + d;
        for (int64_t s = 0; s < to.segments; s++) {
          const int64_t end = std::min((s + 1) * to.segment, padded);
          int32_t total = 0;
          for (int64_t i = s * to.segment; i < end; i++) total += q[i];
          totals[s * to.digits] = total;
        }
        spread_row(q, padded, to.codes + d * height * 4 + r * 4, to.digits * height * 4);
      }
    }
  }

 private:
  int64_t size() const { return a_.height * a_.width * a_.channels; }

  // Copies one window; what lies beyond the image is zero, which the grid has a code for.
  void gather(const int8_t* image, int64_t row, int8_t zero, int8_t* q) const {
    const int64_t place = row % (a_.out_height * a_.out_width);
    const int64_t top = place / a_.out_width * a_.stride[0] - a_.before[0];
    const int64_t left = place % a_.out_width * a_.stride[1] - a_.before[1];
    const bool whole_rows = a_.groups == 1 && a_.dilation[1] == 1 && left >= 0 &&
                            left + a_.window[1] <= a_.width;
    for (int64_t i = 0; i < a_.window[0]; i++) {
      const int64_t y = top + i * a_.dilation[0], run = a_.window[1] * each_;
      if (y < 0 || y >= a_.height) {
        std::memset(q, zero, run);
        q += run;
        continue;
      }
      const int8_t* line = image + y * a_.width * a_.channels + first_;
      if (whole_rows) {
        std::memcpy(q, line + left * a_.channels, run);
        q += run;
        continue;
      }
      for (int64_t j = 0; j < a_.window[1]; j++, q += each_) {
        const int64_t x = left + j * a_.dilation[1];
        if (x < 0 || x >= a_.width) {
          std::memset(q, zero, each_);
        } else {
          std::memcpy(q, line + x * a_.channels, each_);
        }
      }
    }
  }

  const Conv& a_;
  const Image& image_;
  int64_t each_, first_;
};

}  // namespace

const char* check(const Conv& a) {
  const Matmul& p = a.product;
  if (a.groups < 1 || a.channels % a.groups || p.n % a.groups) return "groups do not divide";
  for (int i = 0; i < 2; i++) {
    if (a.window[i] < 1 || a.stride[i] < 1 || a.dilation[i] < 1) {
      return "window, stride and dilation are at least 1";
    }
  }
  if (p.k != a.window[0] * a.window[1] * (a.channels / a.groups)) return "k is not that of a window";
  if (p.m != a.batch * a.out_height * a.out_width) return "m is not the number of windows";
  if (p.m > INT32_MAX || a.batch * a.out_height > INT32_MAX) return "too many windows";
  return check(p);
}

void conv(const Conv& a, const Pool& pool) {
  const Matmul& p = a.product;
  if (p.m == 0 || p.n == 0) return;
  // Sums of products of 8-bit codes are exact as floats up to 2^24.
  if (a.groups == a.channels && p.n == a.channels && p.groups == 1 && p.k <= 256) {
    return depthwise(a, pool);
  }
  const int digits = p.inputs == Inputs::kFloat ? 2 : 1;
  Scratch codes(a.batch * a.height * a.width * a.channels * digits);
  std::vector<Grid> grids(a.batch);
  choose_grids(a, pool, grids.data());
  const Image image{codes.as<int8_t>(), grids.data()};
  round_image(a, pool, image, digits);
  for (int64_t g = 0; g < a.groups; g++) {
    Matmul part = p;
    part.first = g * (p.n / a.groups);
    part.last = part.first + p.n / a.groups;
    products(part, Windows(a, image, g), pool);
  }
}

}  // namespace jom
