// Products of the signs of inputs with packed signs.
//
//   y[i, j] = K[i] scale[j] sum_k sign(x[i, k]) w[k, j],    w = -1 or 1
//
// The sum is the number of inputs less twice the number of those whose sign differs: an exclusive
// or and a count of bits for 32 of them. Lanes are columns, so that nothing is added up across
// them. A convolution gathers the bits of each window, of which there is a 32nd of the inputs;
// what it pads counts as no input at all.
#include "cpu.h"

#include <algorithm>
#include <limits>

namespace jom {
namespace {

#if JOM_POPCOUNT
constexpr int kMostRows = 6, kVectorsOfOne = 4, kVectorsOfFew = 4;
#elif JOM_AVX512
constexpr int kMostRows = 4, kVectorsOfOne = 4, kVectorsOfFew = 4;
#else
constexpr int kMostRows = 4, kVectorsOfOne = 4, kVectorsOfFew = 1;
#endif

struct Job {
  const Binary& a;
  int64_t words;           // of a row
  const uint32_t* codes;   // blocks of rows one after another: [word][row]
  const float* sizes;      // [m]: K, or 1; NaN where an input is
  const int32_t* counts;   // [m]: inputs that are there
  const int32_t* columns;  // [panels][taps][64]: bits set of each tap; null if nothing is padded
};

// Packs the signs of a run; returns the sum of its magnitudes, or 0, or NaN where one is.
float pack(const Binary& a, int64_t at, uint32_t* to, int64_t stride) {
  Floats total = floats(0.0f);
  for (int64_t w = 0; w < a.words; w++) {
    uint32_t word = 0;
    for (int half = 0; half < kWord; half += kLanes) {
      const int64_t left = a.channels - w * kWord - half;
      if (left <= 0) break;
      const int n = left < kLanes ? (int)left : kLanes;
      Floats x = load_as(a.x, at + w * kWord + half, a.x_bf16, n);
      word |= (signs(x) & ((1u << n) - 1)) << half;
      // An infinite input has a sign, and no place in the scale where there is none.
      total = total + (a.scaled ? magnitude(x) : least(floats(1.0f), most(floats(0.0f), x)));
    }
    to[w * stride] = word;
  }
  const float all = sum(total);
  if (a.scaled) return all;
  return all == all ? 0.0f : std::numeric_limits<float>::quiet_NaN();
}

// Calls f(tap, input) for each tap of a pixel of the result, with input -1 for padding.
template <typename F>
JOM_INLINE void each_tap(const Binary& a, int64_t row, F&& f) {
  const int64_t across = row % a.out[1] * a.stride[1] - a.low[1];
  const int64_t down = row / a.out[1] % a.out[0] * a.stride[0] - a.low[0];
  const int64_t first = row / (a.out[0] * a.out[1]) * a.size[0];
  int64_t tap = 0;
  for (int64_t i = 0; i < a.window[0]; i++) {
    const int64_t y = down + i * a.dilation[0];
    const bool inside = y >= 0 && y < a.size[0];
    for (int64_t k = 0; k < a.window[1]; k++) {
      const int64_t x = across + k * a.dilation[1];
      f(tap++, inside && x >= 0 && x < a.size[1] ? (first + y) * a.size[1] + x : -1);
    }
  }
}

// Scales a tile and stores what lies within the columns.
__attribute__((noinline)) void finish(const Job& j, const Ints* acc, int height, int vectors,
                                      int64_t row, int64_t panel, int first) {
  const Binary& a = j.a;
  for (int r = 0; r < height; r++) {
    const int32_t count = j.counts[row + r];
    int32_t differ[kSignPanel];
    for (int v = 0; v < vectors; v++) store_ints(differ + v * kLanes, acc[r * vectors + v]);
    if (count != a.taps * a.channels) {
      // Padding was given as zeros, from which those of the weights that are set differ.
      const int32_t* set = j.columns + panel * a.taps * kSignPanel + first * kLanes;
      each_tap(a, row + r, [&](int64_t tap, int64_t input) {
        if (input >= 0) return;
        const int32_t* p = set + tap * kSignPanel;
        for (int i = 0; i < vectors * kLanes; i++) differ[i] -= p[i];
      });
    }
    for (int v = 0; v < vectors; v++) {
      const int64_t side = panel * kSignPanel + (first + v) * kLanes, left = a.n - side;
      if (left <= 0) break;
      float f[kLanes];
      for (int i = 0; i < kLanes; i++) f[i] = (float)(count - 2 * differ[v * kLanes + i]);
      Floats y = load(f) * load(a.scale + side) * floats(j.sizes[row + r]);
      store_as(a.y, (row + r) * a.n + side, a.y_bf16, y, left < kLanes ? (int)left : kLanes);
    }
  }
}

// Rows `row` to `row + MR` times vectors `first` to `first + NV` of a panel.
template <int MR, int NV>
void tile(const Job& j, int64_t panel, int first, int64_t row) {
  const uint32_t* w = j.a.w + panel * j.words * kSignPanel + first * kLanes;
  const uint32_t* x = j.codes + row * j.words;
  Ints acc[MR][NV];
  for (int r = 0; r < MR; r++) {
    for (int v = 0; v < NV; v++) acc[r][v] = ints(0);
  }
  for (int64_t from = 0; from < j.words; from += kTally) {
    const int64_t end = std::min<int64_t>(from + kTally, j.words);
    Tally t[MR][NV];
    JOM_UNROLL
    for (int r = 0; r < MR; r++) {
      JOM_UNROLL
      for (int v = 0; v < NV; v++) t[r][v] = Tally{};
    }
    for (int64_t i = from; i < end; i++) {
      const uint32_t* p = w + i * kSignPanel;
      Bytes b[NV];
      JOM_UNROLL
      for (int v = 0; v < NV; v++) {
        b[v] = load_bytes(reinterpret_cast<const uint8_t*>(p + v * kLanes));
        // Each weight is read once: what comes from memory is asked for before it is needed.
        if constexpr (MR <= 2) __builtin_prefetch(p + v * kLanes + 1024);
      }
      JOM_UNROLL
      for (int r = 0; r < MR; r++) {
        JOM_UNROLL
        for (int v = 0; v < NV; v++) t[r][v] = apart(t[r][v], b[v], x[i * MR + r]);
      }
    }
    JOM_UNROLL
    for (int r = 0; r < MR; r++) {
      JOM_UNROLL
      for (int v = 0; v < NV; v++) acc[r][v] = plus(acc[r][v], total(t[r][v]));
    }
  }
  finish(j, &acc[0][0], MR, NV, row, panel, first);
}

template <int MR, int NV>
void tiles(const Job& j, int64_t panel, int64_t row) {
  const int64_t columns = std::min<int64_t>(kSignPanel, j.a.n - panel * kSignPanel);
  for (int first = 0; first * kLanes < columns; first += NV) tile<MR, NV>(j, panel, first, row);
}

void rows(const Job& j, int64_t panel, int64_t row, int height) {
  switch (height) {
    case 1: return tiles<1, kVectorsOfOne>(j, panel, row);
    case 2: return tiles<2, kVectorsOfFew>(j, panel, row);
    case 4: return tiles<4, kVectorsOfFew>(j, panel, row);
    default: return tiles<kMostRows, kVectorsOfFew>(j, panel, row);
  }
}

// Writes what a block of rows holds, in the order in which its tile reads it.
void prepare(const Binary& a, int64_t row, int height, const uint32_t* bits, const float* sums,
             uint32_t* codes, float* sizes, int32_t* counts) {
  for (int r = 0; r < height; r++) {
    float size = 0.0f;
    int64_t there = 0;
    uint32_t* to = codes + r;
    if (a.conv) {
      each_tap(a, row + r, [&](int64_t, int64_t input) {
        const uint32_t* from = bits + std::max<int64_t>(input, 0) * a.words;
        for (int64_t w = 0; w < a.words; w++, to += height) *to = input < 0 ? 0 : from[w];
        if (input < 0) return;
        size += sums[input];
        there++;
      });
    } else {
      for (; there < a.taps; there++, to += a.words * height) {
        size += pack(a, ((row + r) * a.taps + there) * a.channels, to, height);
      }
    }
    sizes[r] = a.scaled ? size / (float)(a.taps * a.channels) : 1.0f + size;
    counts[r] = (int32_t)(there * a.channels);
  }
}

}  // namespace

const char* check(const Binary& a) {
  if (a.panels != (a.n + kSignPanel - 1) / kSignPanel) return "panels do not hold n columns";
  if (a.words != (a.channels + kWord - 1) / kWord) return "words do not hold the channels";
  if (a.taps < 0 || a.taps * a.words > (1 << 25)) return "more than 2^30 inputs";
  if (!a.conv) return nullptr;
  if (a.window[0] < 0 || a.window[1] < 0 || a.taps != a.window[0] * a.window[1]) {
    return "taps are not those of the window";
  }
  for (int i = 0; i < 2; i++) {
    if (a.stride[i] < 1 || a.dilation[i] < 1) return "a stride or dilation is not positive";
  }
  if (a.m != a.batch * a.out[0] * a.out[1]) return "rows are not the pixels of the result";
  return nullptr;
}

void binary(const Binary& a, const Pool& pool) {
  if (a.m == 0 || a.n == 0) return;
  const int64_t words = a.taps * a.words;
  const int64_t pixels = a.conv ? a.batch * a.size[0] * a.size[1] : 0;
  Scratch bits(pixels * a.words * sizeof(uint32_t)), sums(pixels * sizeof(float)),
      codes(a.m * words * sizeof(uint32_t)), sizes(a.m * sizeof(float)),
      counts(a.m * sizeof(int32_t)),
      columns(a.conv ? a.panels * a.taps * kSignPanel * sizeof(int32_t) : 0);
  Job j{a, words, codes.as<uint32_t>(), sizes.as<float>(), counts.as<int32_t>(),
        a.conv ? columns.as<int32_t>() : nullptr};

  if (a.conv) {
    share(pool, pixels, pixels * a.channels < 65536, [&](int64_t i) {
      sums.as<float>()[i] = pack(a, i * a.channels, bits.as<uint32_t>() + i * a.words, 1);
    });
    share(pool, a.panels * a.taps, true, [&](int64_t i) {
      for (int v = 0; v < kSignVectors; v++) {
        Ints set = ints(0);
        for (int64_t k = 0; k < a.words; k++) {
          const uint32_t* p = a.w + (i * a.words + k) * kSignPanel + v * kLanes;
          set = plus(set, total(apart(Tally{}, load_bytes(reinterpret_cast<const uint8_t*>(p)), 0)));
        }
        store_ints(columns.as<int32_t>() + i * kSignPanel + v * kLanes, set);
      }
    });
  }

  // Blocks of rows that a tile takes at once, in the order of the rows.
  std::vector<std::pair<int64_t, int>> blocks;
  for (int64_t row = 0; row < a.m;) {
    const int64_t left = a.m - row;
    const int height = left >= kMostRows ? kMostRows : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    blocks.emplace_back(row, height);
    row += height;
  }
  const int64_t count = (int64_t)blocks.size();
  share(pool, count, a.m * a.taps * a.channels < 65536, [&](int64_t b) {
    auto [row, height] = blocks[b];
    prepare(a, row, height, bits.as<uint32_t>(), sums.as<float>(),
            codes.as<uint32_t>() + row * words, sizes.as<float>() + row,
            counts.as<int32_t>() + row);
  });

  // Rows whose bits stay in the cache while all panels pass by.
  const int64_t cached = std::max<int64_t>(1, (256 << 10) / (words * 4 * kMostRows + 1));
  const int64_t chunks = (count + cached - 1) / cached;
  share(pool, chunks * a.panels, a.m * words * a.n < (1 << 17), [&](int64_t i) {
    const int64_t panel = i % a.panels, from = i / a.panels * cached;
    for (int64_t b = from; b < std::min(count, from + cached); b++) {
      rows(j, panel, blocks[b].first, blocks[b].second);
    }
  });
}

}  // namespace jom
