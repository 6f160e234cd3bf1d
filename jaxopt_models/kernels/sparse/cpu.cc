// Products of rows with weights of which only what is kept is stored.
//
//   y[i, j] = s[j] sum_u sum_t x[i, unit u_t] v[u, t]
//
// Of few rows lanes are neighbouring inputs, as weights are read once and that takes most of the
// time. Of many rows lanes are rows, which are turned for that: then a weight that is kept costs
// the same wherever it is. Pairs have columns as lanes, each of which picks its input out of four.
// What is dropped counts as zero, so that a row that is not finite gives NaN in all columns.
#include "cpu.h"

#include <algorithm>

namespace jom {
namespace {

constexpr int kManyRows = 16;  // from which on lanes are rows
constexpr int kBlock = 32;    // rows that are turned together
constexpr int kColumns = 16;  // columns of a piece of work

// Rows as float32, padded with zeros to `width`, and 0 for each, or NaN if it is not finite.
struct Inputs {
  Inputs(const Rows& a, int64_t width, const Pool& pool)
      : width(width), copied(a.x_bf16 || width != a.k),
        room(copied ? a.m * width * sizeof(float) : 0), faults(a.m * sizeof(float)),
        x(copied ? room.as<float>() : static_cast<const float*>(a.x)), fault(faults.as<float>()) {
    share(pool, a.m, a.m * a.k < 65536, [&](int64_t r) {
      Floats total = floats(0.0f);
      for (int64_t i = 0; i < a.k; i += kLanes) {
        const int n = (int)std::min<int64_t>(kLanes, a.k - i);
        Floats v = load_as(a.x, r * a.k + i, a.x_bf16, n);
        total = total + v * floats(0.0f);
        if (copied) store(room.as<float>() + r * width + i, v, n);
      }
      if (copied) {
        float* row = room.as<float>() + r * width;
        std::fill(row + a.k, row + width, 0.0f);
      }
      fault[r] = sum(total);
    });
  }

  int64_t width;
  bool copied;
  Scratch room, faults;
  const float* x;
  float* fault;
};

// ------------------------------------------------------------------ blocks

// Rows `row` to `row + MR` times a few columns.
template <Kind kind, int unit, int MR>
void few(const Blocks& a, const Inputs& in, int64_t row, int64_t from, int64_t to) {
  constexpr int each = kLanes / unit;
  const float* x = in.x + row * a.k;
  float y[MR][kColumns];
  for (int64_t j = from; j < to; j++) {
    int64_t u = a.starts[j];
    const int64_t end = a.starts[j + 1];
    Floats acc[MR];
    for (int r = 0; r < MR; r++) acc[r] = floats(0.0f);
    for (; u + each <= end; u += each) {
      Floats v = value<kind>(a.values, u * unit, kLanes);
      JOM_UNROLL
      for (int r = 0; r < MR; r++) acc[r] = acc[r] + v * picked<unit>(x + r * a.k, a.index + u);
    }
    if (u < end) {
      uint16_t last[each] = {};
      std::copy(a.index + u, a.index + end, last);
      Floats v = value<kind>(a.values, u * unit, (int)(end - u) * unit);
      for (int r = 0; r < MR; r++) acc[r] = acc[r] + v * picked<unit>(x + r * a.k, last);
    }
    for (int r = 0; r < MR; r++) y[r][j - from] = sum(acc[r]) * (a.scale ? a.scale[j] : 1.0f);
  }
  for (int r = 0; r < MR; r++) {
    const int n = (int)(to - from);
    Floats all = load(y[r], n) + floats(in.fault[row + r]);
    store_as(a.y, (row + r) * a.n + from, a.y_bf16, all, n);
  }
}

// A block of rows, turned to [k][32], times a few columns; H vectors hold them.
template <Kind kind, int unit, int H>
void many(const Blocks& a, const Inputs& in, const float* turned, int64_t row, int64_t from,
          int64_t to) {
  constexpr int each = kLanes / unit;
  const int height = (int)std::min<int64_t>(H * kLanes, a.m - row);
  float y[kColumns][kBlock];
  for (int64_t j = from; j < to; j++) {
    Floats acc[2][H];
    for (int h = 0; h < H; h++) acc[0][h] = acc[1][h] = floats(0.0f);
    const int64_t end = a.starts[j + 1];
    for (int64_t u = a.starts[j]; u < end; u += each) {
      const int units = (int)std::min<int64_t>(each, end - u);
      float v[kLanes];
      store(v, value<kind>(a.values, u * unit, units * unit));
      for (int i = 0; i < units; i++) {
        const float* x = turned + (int64_t)a.index[u + i] * unit * kBlock;
        JOM_UNROLL
        for (int t = 0; t < unit; t++) {
          const Floats w = floats(v[i * unit + t]);
          JOM_UNROLL
          for (int h = 0; h < H; h++) {
            acc[t % 2][h] = acc[t % 2][h] + w * load(x + t * kBlock + h * kLanes);
          }
        }
      }
    }
    const Floats scale = floats(a.scale ? a.scale[j] : 1.0f);
    for (int h = 0; h < H; h++) {
      store(y[j - from] + h * kLanes, (acc[0][h] + acc[1][h]) * scale);
    }
  }
  for (int r = 0; r < height; r++) {
    float out[kLanes] = {};
    for (int64_t j = from; j < to; j++) out[j - from] = y[j - from][r] + in.fault[row + r];
    store_as(a.y, (row + r) * a.n + from, a.y_bf16, load(out), (int)(to - from));
  }
}

template <Kind kind, int unit>
void blocks_of(const Blocks& a, const Pool& pool) {
  Inputs in(a, a.k, pool);
  const int64_t pieces = (a.n + kColumns - 1) / kColumns;
  const bool alone = a.m * (a.units * unit + a.n) < 65536;
  if (a.m < kManyRows) {
    share(pool, pieces, alone, [&](int64_t p) {
      const int64_t from = p * kColumns, to = std::min(a.n, from + kColumns);
      int64_t row = 0;
      for (; row + 4 <= a.m; row += 4) few<kind, unit, 4>(a, in, row, from, to);
      for (; row + 2 <= a.m; row += 2) few<kind, unit, 2>(a, in, row, from, to);
      if (row < a.m) few<kind, unit, 1>(a, in, row, from, to);
    });
    return;
  }
  const int64_t heights = (a.m + kBlock - 1) / kBlock;
  Scratch room(heights * a.k * kBlock * sizeof(float));
  share(pool, heights * (a.k / unit), a.m * a.k < 65536, [&](int64_t i) {
    const int64_t b = i / (a.k / unit), first = i % (a.k / unit) * unit;
    float* to = room.as<float>() + (b * a.k + first) * kBlock;
    for (int r = 0; r < kBlock; r++) {
      const int64_t row = b * kBlock + r;
      for (int t = 0; t < unit; t++) {
        to[t * kBlock + r] = row < a.m ? in.x[row * a.k + first + t] : 0.0f;
      }
    }
  });
  share(pool, heights * pieces, alone, [&](int64_t i) {
    const int64_t b = i / pieces, from = i % pieces * kColumns;
    const int64_t row = b * kBlock, to = std::min(a.n, from + kColumns);
    const float* turned = room.as<float>() + row * a.k;
    a.m - row > kLanes ? many<kind, unit, 2>(a, in, turned, row, from, to)
                       : many<kind, unit, 1>(a, in, turned, row, from, to);
  });
}

template <Kind kind>
void blocks_of(const Blocks& a, const Pool& pool) {
  switch (a.unit) {
    case 4: return blocks_of<kind, 4>(a, pool);
    case 8: return blocks_of<kind, 8>(a, pool);
    default: return blocks_of<kind, 16>(a, pool);
  }
}

// ------------------------------------------------------------------ pairs

template <Kind kind, int MR>
void panel(const Pairs& a, const Inputs& in, int64_t row, int64_t p) {
  const float* x = in.x + row * in.width;
  Floats acc[MR][2];
  for (int r = 0; r < MR; r++) acc[r][0] = acc[r][1] = floats(0.0f);
  for (int64_t c = 0; c < a.chunks; c++) {
    const int64_t at = (p * a.chunks + c) * kLanes;
    Places which(a.places + at);
    JOM_UNROLL
    for (int s = 0; s < kRunsOfWord; s++) {
      JOM_UNROLL
      for (int i = 0; i < 2; i++) {
        Floats v = value<kind>(a.values, (at * kRunsOfWord + s * kLanes) * 2 + i * kLanes, kLanes);
        JOM_UNROLL
        for (int r = 0; r < MR; r++) {
          acc[r][i] = acc[r][i] + v * which.of(x + r * in.width + c * kPairChunk + 4 * s);
        }
        which.next();
      }
    }
  }
  const int64_t left = a.n - p * kLanes;
  for (int r = 0; r < MR; r++) {
    Floats y = acc[r][0] + acc[r][1] + floats(in.fault[row + r]);
    store_as(a.y, (row + r) * a.n + p * kLanes, a.y_bf16, y, left < kLanes ? (int)left : kLanes);
  }
}

template <Kind kind>
void pairs_of(const Pairs& a, const Pool& pool) {
  Inputs in(a, a.chunks * kPairChunk, pool);
  share(pool, a.panels, a.m * a.panels * a.chunks < 256, [&](int64_t p) {
    int64_t row = 0;
    for (; row + 4 <= a.m; row += 4) panel<kind, 4>(a, in, row, p);
    for (; row + 2 <= a.m; row += 2) panel<kind, 2>(a, in, row, p);
    if (row < a.m) panel<kind, 1>(a, in, row, p);
  });
}

}  // namespace

const char* check(const Blocks& a) {
  if (a.unit != 4 && a.unit != 8 && a.unit != 16) return "a unit is not of 4, 8 or 16 inputs";
  if (a.k % a.unit) return "units do not divide the inputs";
  for (int64_t j = 0; j < a.n; j++) {
    if (a.starts[j] < 0 || a.starts[j] > a.starts[j + 1]) return "columns do not start in order";
  }
  if (a.starts[a.n] > a.units) return "there are fewer units than columns say";
  uint16_t most = 0;
  for (int64_t u = 0; u < a.units; u++) most = a.index[u] > most ? a.index[u] : most;
  if (a.units && most >= a.k / a.unit) return "an index is beyond the inputs";
  return nullptr;
}

const char* check(const Pairs& a) {
  if (a.panels != (a.n + kLanes - 1) / kLanes) return "panels do not hold n columns";
  if (a.chunks != (a.k + kPairChunk - 1) / kPairChunk) return "chunks do not hold k inputs";
  if (a.kind == Kind::kInt8) return "values are not float32 or bfloat16";
  return nullptr;
}

void blocks(const Blocks& a, const Pool& pool) {
  if (a.m == 0 || a.n == 0) return;
  switch (a.kind) {
    case Kind::kFloat: return blocks_of<Kind::kFloat>(a, pool);
    case Kind::kBf16: return blocks_of<Kind::kBf16>(a, pool);
    default: return blocks_of<Kind::kInt8>(a, pool);
  }
}

void pairs(const Pairs& a, const Pool& pool) {
  if (a.m == 0 || a.n == 0) return;
  a.kind == Kind::kFloat ? pairs_of<Kind::kFloat>(a, pool) : pairs_of<Kind::kBf16>(a, pool);
}

}  // namespace jom
