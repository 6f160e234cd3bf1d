// Products of rows with weights of which only what is kept is stored; see cpu.cc.
#ifndef JOM_SPARSE_CPU_H_
#define JOM_SPARSE_CPU_H_

#include <cstdint>

#include "../_native/epilogue.h"
#include "../_native/pool.h"
#include "../_native/values.h"

namespace jom {

// What both have: rows, types, and the result.
struct Rows {
  int64_t m, k, n;
  const void* x;          // [m, k] float32 or bfloat16
  bool x_bf16;
  const void* values;
  Kind kind;
  void* y;                // [m, n] float32 or bfloat16
  bool y_bf16;
};

// Units of 4, 8 or 16 neighbouring inputs of one column.
struct Blocks : Rows {
  int64_t units;          // values are [units, unit], column after column
  int unit;
  const uint16_t* index;  // [units]: which of the k / unit runs of inputs
  const int32_t* starts;  // [n + 1]: where the units of each column start
  const float* scale;     // [n], or null
};

// Two of every four inputs of each column: values [panels, chunks, 8, 2, 16] for panels of 16
// columns and chunks of 32 inputs, and which they are, two bits each in the order of the values.
inline constexpr int kRunsOfWord = 8, kPairChunk = 4 * kRunsOfWord;
struct Pairs : Rows {
  int64_t panels, chunks;
  const uint32_t* places;  // [panels, chunks, 16]
};

// Return nullptr, or what is wrong with sizes and indices.
const char* check(const Blocks& a);
const char* check(const Pairs& a);
// These must have been checked.
void blocks(const Blocks& a, const Pool& pool);
void pairs(const Pairs& a, const Pool& pool);

}  // namespace jom

#endif  // JOM_SPARSE_CPU_H_
