// Products of rows with packed integer weights; see cpu.cc.
#ifndef JOM_MATMUL_CPU_H_
#define JOM_MATMUL_CPU_H_

#include <cstdint>
#include <functional>

#include "../_native/epilogue.h"
#include "../_native/pool.h"

namespace jom {

// Weights are packed in panels of 64 columns and chunks of 32 inputs. A chunk of 8-bit codes is
// [8][4][64] bytes: eight steps of four inputs, four vectors of 16 columns, and in a vector the
// four inputs of each column. Narrower codes share bytes: step s of a chunk is in
//   4 bits: vector s / 2, bits 4 (s % 2) and up
//   2 bits: vector s / 4, bits 2 (s % 4) and up
//   3 bits: as 2 bits, and bit s of a third vector
//   1 bit:  bit s of one vector
inline constexpr int kPanel = 64, kChunk = 32, kSteps = 8, kVectors = kPanel / kLanes;

enum class Inputs : int {
  kFloat,    // not rounded, but to 16 bits of the largest of up to 256 neighbours
  kRow,      // to integers by the largest magnitude of a row
  kRowPair,  // to integers between the least and the greatest of a row
  kStatic,   // to integers by a given scale, and zero point if there is one
};

struct Matmul {
  int64_t m, k, n;
  int64_t panels, chunks;  // of the packed weights
  int64_t groups;          // runs of inputs with scales of their own
  int64_t first, last;     // which columns are computed, usually 0 and n
  int bits;
  const void* x;           // [m, k] float32 or bfloat16
  bool x_bf16;
  const uint8_t* w;        // [panels, chunks, bits * 256]
  const float* scale;      // [panels, groups, 64]
  const float* zero;       // likewise, in codes less 2^(bits - 1); or null
  const float* sums;       // likewise: sums of codes less zero; for kRowPair, kStatic with a zero
  const float* table;      // [16]: values by code, where codes are 4 bits without offset; or null
  const float* bias;       // [n] or null
  Inputs inputs;
  int input_bits;
  float input_scale;
  float input_zero;        // as a code of the unsigned grid
  bool input_symmetric;
  Activation act;
  void* y;                 // [m, n] float32 or bfloat16
  bool y_bf16;
};

// Rows of inputs as codes, in the order of the tiles that read them.
struct Rounded {
  int digits;        // 1, or 2 bytes for each input, the higher first
  int64_t segment;   // inputs that share a scale, a multiple of 32
  int64_t segments;
  int8_t* codes;     // for each tile [step of 4 inputs][digit][row][4]
  float* scales;     // [row][segments]; NaN where an input is not finite
  int32_t* totals;   // [row][segments][digits]: sums of codes
  float* zeros;      // [row]: zero points less 2^(bits - 1)

  // The same from a row on, of which the codes take `padded` inputs.
  Rounded from(int64_t row, int64_t padded) const {
    return {digits, segment, segments, codes + row * padded * digits, scales + row * segments,
            totals + row * segments * digits, zeros + row};
  }
};

// Writes rows `row` to `row + height`, which are one tile, to the start of a `Rounded`.
using Prepare = std::function<void(int64_t row, int height, const Rounded& x)>;

// Returns nullptr, or what is wrong with the sizes.
const char* check(const Matmul& a);
// Multiplies rows that `prepare` writes, wherever they come from; a.x is not read.
void products(const Matmul& a, const Prepare& prepare, const Pool& pool);
// Sizes must have been checked.
void matmul(const Matmul& a, const Pool& pool);

}  // namespace jom

#endif  // JOM_MATMUL_CPU_H_
