// Products of rows with packed integer weights.
//
//   y[i, j] = act(bias[j] + sum_g s[g, j] u[i, g] sum_k (a[i, k] - z'[i]) (q[k, j] - z[g, j]))
//
// Inputs become signed bytes a with a scale u, weights are unsigned bytes q less 2^(bits - 1):
// what a dot product of bytes takes. Inputs that are not to be rounded become two such bytes,
// 256 hi + lo, with a scale for every run of at most 256: 16 bits, of which products with bytes
// are exact. So one kernel computes with integers whatever the inputs are.
#include "cpu.h"

#include <algorithm>

#include "../_native/quantize.h"

namespace jom {
namespace {

constexpr int kMostRows = 6;    // of a tile, where codes are whole bytes
constexpr int kFewRows = 4;     // and where they are unpacked in it
constexpr int kUnpackedOnce = 12;  // rows from which on a panel is unpacked before it is used

struct Job {
  const Matmul& a;
  int digits;
  int64_t segment;   // inputs that share a scale, a multiple of 32
  int64_t segments;
  const int8_t* codes;    // blocks of rows one after another: [step][digit][row][4]
  const float* scales;    // [m][segments]
  const int32_t* totals;  // [m][segments][digits]
  const float* zeros;     // [m], of the inputs
};

// Calls f(step, codes) for the eight steps of one vector of a chunk at p.
template <int BITS, typename F>
JOM_INLINE void each_step(const uint8_t* p, F&& f) {
  constexpr int line = kPanel * 4;
  if constexpr (BITS == 8) {
    JOM_UNROLL
    for (int s = 0; s < kSteps; s++) f(s, load_bytes(p + s * line));
  } else if constexpr (BITS == 4) {
    JOM_UNROLL
    for (int i = 0; i < 4; i++) {
      Bytes raw = load_bytes(p + i * line);
      f(2 * i, bits_of<0>(raw, 15));
      f(2 * i + 1, bits_of<4>(raw, 15));
    }
  } else if constexpr (BITS == 2) {
    JOM_UNROLL
    for (int i = 0; i < 2; i++) {
      Bytes raw = load_bytes(p + i * line);
      f(4 * i, bits_of<0>(raw, 3));
      f(4 * i + 1, bits_of<2>(raw, 3));
      f(4 * i + 2, bits_of<4>(raw, 3));
      f(4 * i + 3, bits_of<6>(raw, 3));
    }
  } else if constexpr (BITS == 3) {
    Bytes first = load_bytes(p), second = load_bytes(p + line), top = load_bytes(p + 2 * line);
    f(0, either(bits_of<0>(first, 3), bits_of<0>(shift_up<2>(top), 4)));
    f(1, either(bits_of<2>(first, 3), bits_of<0>(shift_up<1>(top), 4)));
    f(2, either(bits_of<4>(first, 3), bits_of<0>(top, 4)));
    f(3, either(bits_of<6>(first, 3), bits_of<1>(top, 4)));
    f(4, either(bits_of<0>(second, 3), bits_of<2>(top, 4)));
    f(5, either(bits_of<2>(second, 3), bits_of<3>(top, 4)));
    f(6, either(bits_of<4>(second, 3), bits_of<4>(top, 4)));
    f(7, either(bits_of<6>(second, 3), bits_of<5>(top, 4)));
  } else {
    static_assert(BITS == 1);
    Bytes raw = load_bytes(p);
    f(0, bits_of<0>(raw, 1));
    f(1, bits_of<1>(raw, 1));
    f(2, bits_of<2>(raw, 1));
    f(3, bits_of<3>(raw, 1));
    f(4, bits_of<4>(raw, 1));
    f(5, bits_of<5>(raw, 1));
    f(6, bits_of<6>(raw, 1));
    f(7, bits_of<7>(raw, 1));
  }
}

// Adds the products of a chunk to the accumulators of a tile.
template <int BITS, int D, int MR, int NV>
JOM_INLINE void add_chunk(Ints (&acc)[D][MR][NV], const uint8_t* p, const int8_t* a) {
  if constexpr (BITS == 8) {
    // A step at a time for all vectors, so that an input is read once for them.
    for (int s = 0; s < kSteps; s++) {
      Bytes w[NV];
      JOM_UNROLL
      for (int v = 0; v < NV; v++) w[v] = load_bytes(p + s * (kPanel * 4) + 64 * v);
      JOM_UNROLL
      for (int r = 0; r < D * MR; r++) {
        int32_t four;
        std::memcpy(&four, a + 4 * (s * D * MR + r), 4);
        JOM_UNROLL
        for (int v = 0; v < NV; v++) acc[r / MR][r % MR][v] = dot4(acc[r / MR][r % MR][v], w[v], four);
      }
    }
  } else {
    JOM_UNROLL
    for (int v = 0; v < NV; v++) {
      each_step<BITS>(p + 64 * v, [&](int s, Bytes w) __attribute__((always_inline)) {
        JOM_UNROLL
        for (int r = 0; r < D * MR; r++) {
          int32_t four;
          std::memcpy(&four, a + 4 * (s * D * MR + r), 4);
          acc[r / MR][r % MR][v] = dot4(acc[r / MR][r % MR][v], w, four);
        }
      });
    }
  }
}

// Adds the bias to a tile, applies the activation function, and stores what lies within the columns.
__attribute__((noinline)) void finish(const Matmul& a, const Floats* f, int height, int vectors,
                                      int64_t row, int64_t column) {
  for (int v = 0; v < vectors; v++) {
    const int64_t at = column + v * kLanes, left = a.n - at;
    if (left <= 0) return;
    const int lanes = left < kLanes ? (int)left : kLanes;
    for (int r = 0; r < height; r++) {
      Floats y = f[r * vectors + v];
      if (a.bias) y = y + load(a.bias + at, lanes);
      store_as(a.y, (row + r) * a.n + at, a.y_bf16, activated(y, a.act), lanes);
    }
  }
}

// Rows `row` to `row + MR` times vectors `first` to `first + NV` of a panel at `w`.
template <int BITS, int D, int MR, int NV>
void tile(const Job& j, const uint8_t* w, int64_t panel, int first, int64_t row) {
  const Matmul& a = j.a;
  const int offset = 1 << (a.bits - 1);
  const int64_t per_segment = j.segment / kChunk, segments = j.segments;
  const int64_t column = panel * kPanel + first * kLanes;
  const int8_t* codes = j.codes + row * a.chunks * kChunk * D;
  const float* scale = a.scale + panel * a.groups * kPanel + first * kLanes;
  const int64_t side = scale - a.scale;
  w += first * 64;

  Floats f[MR][NV];
  Ints acc[D][MR][NV];
  for (int64_t s = 0; s < segments; s++) {
    const int32_t* totals = j.totals + (row * segments + s) * D;
    JOM_UNROLL
    for (int d = 0; d < D; d++) {
      JOM_UNROLL
      for (int r = 0; r < MR; r++) {
        Ints start = ints(-offset * totals[r * segments * D + d]);
        JOM_UNROLL
        for (int v = 0; v < NV; v++) acc[d][r][v] = start;
      }
    }
    const int64_t end = std::min((s + 1) * per_segment, a.chunks);
    for (int64_t c = s * per_segment; c < end; c++) {
      const uint8_t* p = w + c * BITS * (kPanel * 4);
      if constexpr (MR <= kFewRows) {
        // Each weight is read once: what comes from memory is asked for before it is needed.
        for (int i = 0; i < BITS; i++) {
          for (int v = 0; v < NV; v++) __builtin_prefetch(p + i * kPanel * 4 + v * 64 + 4096);
        }
      }
      add_chunk<BITS, D, MR, NV>(acc, p, codes + c * (4 * kSteps * D * MR));
    }
    const int64_t g = a.groups == 1 ? 0 : s * j.segment / (a.chunks * kChunk / a.groups);
    JOM_UNROLL
    for (int r = 0; r < MR; r++) {
      const float u = j.scales[(row + r) * segments + s];
      float total = (float)totals[r * segments * D];
      if constexpr (D == 2) total = total * 256.0f + (float)totals[r * segments * D + 1];
      JOM_UNROLL
      for (int v = 0; v < NV; v++) {
        const int64_t at = g * kPanel + v * kLanes;
        Floats x = to_floats(acc[0][r][v]);
        if constexpr (D == 2) x = x * floats(256.0f) + to_floats(acc[D - 1][r][v]);
        if (a.zero) x = x - load(a.zero + side + at) * floats(total);
        if (a.sums) x = x - floats(j.zeros[row + r]) * load(a.sums + side + at);
        x = x * floats(u) * load(scale + at);
        f[r][v] = s ? f[r][v] + x : x;
      }
    }
  }

  finish(a, &f[0][0], MR, NV, row, column);
}

template <int BITS, int D, int MR, int NV>
void tiles(const Job& j, const uint8_t* w, int64_t panel, int64_t row) {
  const int64_t columns = std::min<int64_t>(kPanel, j.a.n - panel * kPanel);
  for (int first = 0; first * kLanes < columns; first += NV) {
    tile<BITS, D, MR, NV>(j, w, panel, first, row);
  }
}

// Rows of a tile; a block of `rows` starts with as many as this says.
int rows_of_tile(int64_t rows, int most) {
  return rows >= most ? most : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
}

template <int BITS, int D>
void rows(const Job& j, const uint8_t* w, int64_t panel, int64_t row, int height) {
  // Accumulators of a tile fit the registers: 32 of 16 lanes, or 16 of 8.
#if JOM_AVX512
  constexpr int one = 4, few = D == 1 ? 4 : 2, most = D == 1 ? 4 : 2;
#else
  constexpr int one = D == 1 ? 4 : 2, few = 1, most = 1;
#endif
  switch (height) {
    case 1: return tiles<BITS, D, 1, one>(j, w, panel, row);
    case 2: return tiles<BITS, D, 2, few>(j, w, panel, row);
    case 4: return tiles<BITS, D, 4, few>(j, w, panel, row);
    default:
      if constexpr (BITS == 8) return tiles<BITS, D, kMostRows, most>(j, w, panel, row);
  }
}

template <int D>
void rows(const Job& j, int bits, const uint8_t* w, int64_t panel, int64_t row, int height) {
  switch (bits) {
    case 1: return rows<1, D>(j, w, panel, row, height);
    case 2: return rows<2, D>(j, w, panel, row, height);
    case 3: return rows<3, D>(j, w, panel, row, height);
    case 4: return rows<4, D>(j, w, panel, row, height);
    default: return rows<8, D>(j, w, panel, row, height);
  }
}

// Unpacks the chunks of a panel to whole bytes.
template <int BITS>
void unpack(const uint8_t* p, int64_t chunks, uint8_t* to) {
  for (int64_t c = 0; c < chunks; c++, p += BITS * kPanel * 4, to += kSteps * kPanel * 4) {
    for (int v = 0; v < kVectors; v++) {
      each_step<BITS>(p + 64 * v, [&](int s, Bytes w) __attribute__((always_inline)) {
        store_bytes(to + s * kPanel * 4 + 64 * v, w);
      });
    }
  }
}

void unpack(int bits, const uint8_t* p, int64_t chunks, uint8_t* to) {
  switch (bits) {
    case 1: return unpack<1>(p, chunks, to);
    case 2: return unpack<2>(p, chunks, to);
    case 3: return unpack<3>(p, chunks, to);
    default: return unpack<4>(p, chunks, to);
  }
}

int64_t segment_of(const Matmul& a) {
  const int64_t whole = a.chunks * kChunk, group = whole / a.groups;
  if (a.inputs != Inputs::kFloat || group <= 256) return group;
  if (a.groups == 1) return 256;
  int64_t best = kChunk;
  for (int64_t s = kChunk; s <= 256; s += kChunk) {
    if (group % s == 0) best = s;
  }
  return best;
}

}  // namespace

const char* check(const Matmul& a) {
  if (a.bits != 1 && a.bits != 2 && a.bits != 3 && a.bits != 4 && a.bits != 8) {
    return "bits is not 1, 2, 3, 4 or 8";
  }
  if (a.input_bits < 2 || a.input_bits > 8) return "input_bits is not 2 to 8";
  if ((int)a.act < 0 || a.act >= Activation::kCount) return "no such activation";
  if ((int)a.inputs < 0 || a.inputs > Inputs::kStatic) return "no such kind of inputs";
  if (a.panels != (a.n + kPanel - 1) / kPanel) return "panels do not hold n columns";
  if (a.chunks != (a.k + kChunk - 1) / kChunk) return "chunks do not hold k inputs";
  if (a.groups < 1) return "no group";
  if (a.groups > 1 && (a.k % a.groups || a.k / a.groups % kChunk)) {
    return "groups are not of equal length, a multiple of 32";
  }
  // Products of codes of at most 255 and 128 are added up in 32 bits.
  if (a.inputs != Inputs::kFloat && a.k / a.groups > 65536) return "more than 65536 inputs a group";
  const bool shifted = a.inputs == Inputs::kRowPair ||
                       (a.inputs == Inputs::kStatic && !a.input_symmetric);
  if (shifted != (a.sums != nullptr)) return "column sums go with inputs that have a zero point";
  return nullptr;
}

void matmul(const Matmul& a, const Pool& pool) {
  if (a.m == 0 || a.n == 0) return;
  const int digits = a.inputs == Inputs::kFloat ? 2 : 1;
  const int64_t padded = a.chunks * kChunk, segment = std::max<int64_t>(segment_of(a), kChunk);
  const int64_t segments = std::max<int64_t>(1, (padded + segment - 1) / segment);
  const bool once = a.bits < 8 && a.m >= kUnpackedOnce;
  const int most = a.bits == 8 || once ? kMostRows : kFewRows;

  Scratch codes(a.m * padded * digits), scales(a.m * segments * sizeof(float)),
      totals(a.m * segments * digits * sizeof(int32_t)), zeros(a.m * sizeof(float));
  Job j{a, digits, segment, segments, codes.as<int8_t>(), scales.as<float>(),
        totals.as<int32_t>(), zeros.as<float>()};

  // Blocks of rows that a tile takes at once, in the order of the rows.
  std::vector<std::pair<int64_t, int>> blocks;
  for (int64_t row = 0; row < a.m;) {
    int height = rows_of_tile(a.m - row, most);
    blocks.emplace_back(row, height);
    row += height;
  }
  const int count = (int)blocks.size();
  auto prepare = [&](int b) {
    auto [row, height] = blocks[b];
    quantize_rows(a, row, height, segment, segments, digits, codes.as<int8_t>() + row * padded * digits,
                  scales.as<float>() + row * segments, totals.as<int32_t>() + row * segments * digits,
                  zeros.as<float>() + row);
  };
  // A short piece of work is done before a thread has woken up.
  const bool alone = a.m * a.k < 16384;
  if (alone) {
    for (int b = 0; b < count; b++) prepare(b);
  } else {
    const int per = std::max(1, count / (4 * pool.threads()));
    pool.each((count + per - 1) / per, [&](int i) {
      for (int b = i * per; b < std::min(count, (i + 1) * per); b++) prepare(b);
    });
  }

  // Rows whose codes stay in the cache while all panels pass by.
  const int64_t cached = std::max<int64_t>(1, (512 << 10) / (padded * digits + 1));
  std::vector<int> starts;
  for (int b = 0; b < count; b++) {
    if (starts.empty() || blocks[b].first - blocks[starts.back()].first >= cached) {
      starts.push_back(b);
    }
  }
  starts.push_back(count);
  const int64_t parts = (int64_t)(starts.size() - 1) * a.panels;
  const int64_t panel_bytes = a.chunks * a.bits * kPanel * 4;
  auto part = [&](int64_t i) {
    const int64_t panel = i % a.panels;
    const int from = starts[i / a.panels], to = starts[i / a.panels + 1];
    const uint8_t* w = a.w + panel * panel_bytes;
    int bits = a.bits;
    Scratch bytes(once ? a.chunks * kSteps * kPanel * 4 : 0);
    if (once) {
      unpack(bits, w, a.chunks, bytes.as<uint8_t>());
      w = bytes.as<uint8_t>();
      bits = 8;
    }
    for (int b = from; b < to; b++) {
      auto [row, height] = blocks[b];
      digits == 1 ? rows<1>(j, bits, w, panel, row, height) : rows<2>(j, bits, w, panel, row, height);
    }
  };
  const int64_t work = a.m * padded * a.n;
  if (work < (1 << 17)) {
    for (int64_t i = 0; i < parts; i++) part(i);
    return;
  }
  // Neighbouring panels go together, as a thread reads them in one stream.
  const int64_t pieces = std::min<int64_t>(parts, 8 * pool.threads());
  pool.each((int)pieces, [&](int p) {
    for (int64_t i = parts * p / pieces; i < parts * (p + 1) / pieces; i++) part(i);
  });
}

}  // namespace jom
