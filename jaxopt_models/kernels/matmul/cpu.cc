// Products of rows with packed integer weights.
//
//   y[i, j] = act(bias[j] + sum_g s[g, j] u[i, g] sum_k (a[i, k] - z'[i]) (q[k, j] - z[g, j]))
//
// Inputs become signed bytes a with a scale u, weights are unsigned bytes q less 2^(bits - 1):
// what a dot product of bytes takes. Inputs that are not to be rounded become two such bytes,
// 256 hi + lo, with a scale for every run of at most 256: 16 bits, of which products with bytes
// are exact. So one kernel computes with integers whatever the inputs are.
//
// Codes of a table stand for 16 bits of its largest value, two bytes as well. Of the four products of
// bytes the least is left out: it is below 2^-16 of the greatest.
#include "cpu.h"

#include <algorithm>

#include "../_native/quantize.h"
#include "steps.h"

namespace jom {
namespace {

constexpr int kMostRows = 6;  // of a tile, where codes are whole bytes
constexpr int kFewRows = 4;   // and where they are unpacked in it
// Weights that stay in the cache of a core.
constexpr int64_t kNearBytes = 768 << 10;

struct Job {
  const Matmul& a;
  const Rounded& x;
  int64_t row;  // that the codes start with
  // The values of a table as bytes, each 128 more; and what the lowest bit of both stands for.
  uint8_t high[16], low[16];
  float step;
};

void take_table(Job& j) {
  float most = 0.0f;
  for (int i = 0; i < 16; i++) most = std::max(most, std::fabs(j.a.table[i]));
  j.step = most > 0.0f ? most / kSixteenBits : 1.0f;
  for (int i = 0; i < 16; i++) {
    const int32_t c = (int32_t)std::nearbyint(j.a.table[i] / j.step), h = (c + 128) >> 8;
    j.high[i] = (uint8_t)(h + 128);
    j.low[i] = (uint8_t)(c - h * 256 + 128);
  }
}

// Adds the products of a chunk to the accumulators of a tile.
template <int BITS, int D, int MR, int NV>
JOM_INLINE void add_chunk(Ints (&acc)[D][MR][NV], const uint8_t* p, const int8_t* a) {
  each_step<BITS, NV>(p, [&](int s, const Vectors<NV>& w) __attribute__((always_inline)) {
    JOM_UNROLL
    for (int r = 0; r < D * MR; r++) {
      int32_t four;
      std::memcpy(&four, a + 4 * (s * D * MR + r), 4);
      JOM_UNROLL
      for (int v = 0; v < NV; v++) acc[r / MR][r % MR][v] = dot4(acc[r / MR][r % MR][v], w[v], four);
    }
  });
}

// Whether all columns of a tile are stored, as they are.
JOM_INLINE bool is_plain(const Matmul& a, int64_t column, int vectors) {
  return column >= a.first && column + vectors * kLanes <= a.last && !a.y_bf16 && !a.bias &&
         a.act == Activation::kNone;
}

// Adds the bias to a tile, applies the activation function, and stores what lies within the columns.
__attribute__((noinline)) void finish(const Matmul& a, const Floats* f, int height, int vectors,
                                      int64_t row, int64_t column) {
  if (is_plain(a, column, vectors)) {
    for (int r = 0; r < height; r++) {
      float* to = (float*)a.y + (row + r) * a.n + column;
      for (int v = 0; v < vectors; v++) store(to + v * kLanes, f[r * vectors + v]);
    }
    return;
  }
  for (int v = 0; v < vectors; v++) {
    const int64_t at = column + v * kLanes;
    if (at >= a.last) return;
    const int first = (int)std::max<int64_t>(0, a.first - at);
    const int lanes = (int)std::min<int64_t>(kLanes, a.last - at);
    if (lanes <= first) continue;
    for (int r = 0; r < height; r++) {
      Floats y = f[r * vectors + v];
      if (a.bias) y = y + load(a.bias + at, lanes);
      y = activated(y, a.act);
      const int64_t to = (row + r) * a.n + at;
      if (!first) {
        store_as(a.y, to, a.y_bf16, y, lanes);
        continue;
      }
      float all[kLanes];
      store(all, y);
      for (int i = first; i < lanes; i++) store_one(a.y, to + i, a.y_bf16, all[i]);
    }
  }
}

// The same where codes stand for the values of a table: 256 acc[0] + acc[1] is the sum of the
// products, in steps of the table and, of inputs that are two bytes, of 256 of theirs.
template <int D, int MR, int NV>
JOM_INLINE void add_table_chunk(Ints (&acc)[2][MR][NV], const Job& j, const uint8_t* p,
                                const int8_t* a) {
  each_step<4, NV>(p, [&](int s, const Vectors<NV>& w) __attribute__((always_inline)) {
    JOM_UNROLL
    for (int v = 0; v < NV; v++) {
      const Bytes high = lookup(j.high, w[v]), low = lookup(j.low, w[v]);
      JOM_UNROLL
      for (int r = 0; r < MR; r++) {
        int32_t four[D];
        for (int d = 0; d < D; d++) std::memcpy(&four[d], a + 4 * ((s * D + d) * MR + r), 4);
        acc[0][r][v] = dot4(acc[0][r][v], high, four[0]);
        acc[1][r][v] = dot4(acc[1][r][v], low, four[0]);
        if constexpr (D == 2) acc[1][r][v] = dot4(acc[1][r][v], high, four[1]);
      }
    }
  });
}

// Rows `row` to `row + MR` times vectors `first` to `first + NV` of a panel.
template <int BITS, int D, int MR, int NV, bool TABLE>
void tile(const Job& j, int64_t panel, int first, int64_t row) {
  const Matmul& a = j.a;
  const Rounded& x = j.x;
  constexpr int offset = TABLE ? 128 : 1 << (BITS - 1), A = TABLE ? 2 : D;
  const int64_t per_segment = x.segment / kChunk, segments = x.segments, local = row - j.row;
  const int8_t* codes = x.codes + local * a.chunks * kChunk * D;
  const uint8_t* w = a.w + panel * a.chunks * (BITS * kPanel * 4) + first * 64;
  const int64_t side = panel * a.groups * kPanel + first * kLanes;

  Floats sums[MR * NV], *f = sums;
  // In memory, not in registers, which the accumulators need.
  asm("" : "+r"(f) : : "memory");
  Ints acc[A][MR][NV];
  for (int64_t s = 0; s < segments; s++) {
    const int32_t* totals = x.totals + (local * segments + s) * D;
    JOM_UNROLL
    for (int d = 0; d < A; d++) {
      JOM_UNROLL
      for (int r = 0; r < MR; r++) {
        const int32_t* t = totals + r * segments * D;
        // The second sum of a table is of all bytes of inputs.
        const int32_t total = !TABLE ? t[d] : d && D == 2 ? t[0] + t[1] : t[0];
        Ints start = ints(-offset * total);
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
      const int8_t* x_codes = codes + c * (4 * kSteps * D * MR);
      if constexpr (TABLE) {
        add_table_chunk<D, MR, NV>(acc, j, p, x_codes);
      } else {
        add_chunk<BITS, D, MR, NV>(acc, p, x_codes);
      }
    }
    const int64_t g = a.groups == 1 ? 0 : s * x.segment / (a.chunks * kChunk / a.groups);
    if (!TABLE && segments == 1 && !a.zero && !a.sums) {  // nothing but the scales
      const int64_t column = panel * kPanel + first * kLanes;
      const bool plain = is_plain(a, column, NV);
      JOM_UNROLL
      for (int r = 0; r < MR; r++) {
        const Floats u = floats(x.scales[local + r]);
        float* to = plain ? (float*)a.y + (row + r) * a.n + column : (float*)(f + r * NV);
        JOM_UNROLL
        for (int v = 0; v < NV; v++) {
          const Floats y = to_floats(D == 2 ? joined(acc[0][r][v], acc[A - 1][r][v]) : acc[0][r][v]);
          store(to + v * kLanes, y * u * load(a.scale + side + v * kLanes));
        }
      }
      if (plain) return;
      break;
    }
    JOM_UNROLL
    for (int r = 0; r < MR; r++) {
      float u = x.scales[(local + r) * segments + s];
      if constexpr (TABLE) u = u * (D == 2 ? 256.0f * j.step : j.step);
      const int32_t* t = totals + r * segments * D;
      const float total = (float)(D == 2 ? 256 * t[0] + t[D - 1] : t[0]);
      JOM_UNROLL
      for (int v = 0; v < NV; v++) {
        const int64_t at = side + g * kPanel + v * kLanes;
        // At most 2^31: 256 inputs of 16 bits times codes of 8, less their offset.
        Floats y = to_floats(D == 2 ? joined(acc[0][r][v], acc[A - 1][r][v]) : acc[0][r][v]);
        if constexpr (TABLE && D == 1) y = y * floats(256.0f) + to_floats(acc[1][r][v]);
        if (a.zero) y = y - load(a.zero + at) * floats(total);
        if (a.sums) y = y - floats(x.zeros[local + r]) * load(a.sums + at);
        y = y * floats(u) * load(a.scale + at);
        f[r * NV + v] = s ? f[r * NV + v] + y : y;
      }
    }
  }
  finish(a, f, MR, NV, row, panel * kPanel + first * kLanes);
}

template <int BITS, int D, int MR, int NV, bool TABLE>
void tiles(const Job& j, int64_t panel, int64_t row) {
  const int64_t from = j.a.first - panel * kPanel, to = j.a.last - panel * kPanel;
  for (int first = 0; first < kVectors; first += NV) {
    if (first * kLanes < to && (first + NV) * kLanes > from) {
      tile<BITS, D, MR, NV, TABLE>(j, panel, first, row);
    }
  }
}

template <int BITS, int D, bool TABLE = false>
void rows(const Job& j, int64_t panel, int64_t row, int height) {
  // Accumulators of a tile fit the registers: 32 of 16 lanes, or 16 of 8.
  constexpr bool both = D == 2 || TABLE;
#if JOM_AVX512
  constexpr int one = 4, few = both ? 2 : 4, most = both ? 2 : 4;
#elif JOM_PORTABLE
  constexpr int one = 1, few = 1, most = 1;
#else
  constexpr int one = both ? 2 : 4, few = 1, most = 1;
#endif
  switch (height) {
    case 1: return tiles<BITS, D, 1, one, TABLE>(j, panel, row);
    case 2: return tiles<BITS, D, 2, few, TABLE>(j, panel, row);
    case 4: return tiles<BITS, D, 4, few, TABLE>(j, panel, row);
    default:
      if constexpr (BITS == 8) return tiles<BITS, D, kMostRows, most, TABLE>(j, panel, row);
  }
}

template <int D>
void rows(const Job& j, int64_t panel, int64_t row, int height) {
  if (j.a.table) return rows<4, D, true>(j, panel, row, height);
  switch (j.a.bits) {
    case 1: return rows<1, D>(j, panel, row, height);
    case 2: return rows<2, D>(j, panel, row, height);
    case 3: return rows<3, D>(j, panel, row, height);
    case 4: return rows<4, D>(j, panel, row, height);
    default: return rows<8, D>(j, panel, row, height);
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
  if (a.groups > 1 && (a.k < a.groups || a.k % a.groups || a.k / a.groups % kChunk)) {
    return "groups are not of equal length, a multiple of 32";
  }
  // Products of codes of at most 255 and 128 are added up in 32 bits.
  if (a.inputs != Inputs::kFloat && a.k / a.groups > 65536) return "more than 65536 inputs a group";
  if (a.table && (a.bits != 4 || a.zero || a.sums)) {
    return "a table has codes of 4 bits, and no zero points";
  }
  if (a.first < 0 || a.last > a.n) return "columns beyond the weights";
  const bool shifted = a.inputs == Inputs::kRowPair ||
                       (a.inputs == Inputs::kStatic && !a.input_symmetric);
  // Sums of no columns are null, as what is left out is.
  if (a.panels && shifted != (a.sums != nullptr)) {
    return "column sums go with inputs that have a zero point";
  }
  return nullptr;
}

void products(const Matmul& a, const Prepare& prepare, const Pool& pool) {
  if (a.m == 0 || a.last <= a.first) return;
  const int digits = a.inputs == Inputs::kFloat ? 2 : 1;
  const int64_t padded = a.chunks * kChunk, segment = std::max<int64_t>(segment_of(a), kChunk);
  const int64_t segments = std::max<int64_t>(1, (padded + segment - 1) / segment);
  const int most = a.bits == 8 ? kMostRows : kFewRows;
  // Rows whose codes stay in the caches while all panels pass by; and of these what one thread
  // takes at a time.
  const int64_t bytes = padded * digits + 1;
  const int64_t part = std::max<int64_t>(most, (384 << 10) / bytes / most * most);
  const int64_t whole = std::min(a.m, part * 2 * std::max(1, pool.threads()));

  Scratch codes(whole * padded * digits), scales(whole * segments * sizeof(float)),
      totals(whole * segments * digits * sizeof(int32_t)), zeros(whole * sizeof(float));
  const Rounded x{digits, segment, segments, codes.as<int8_t>(), scales.as<float>(),
                  totals.as<int32_t>(), zeros.as<float>()};
  const int64_t panel = a.first / kPanel, panels = (a.last + kPanel - 1) / kPanel - panel;

  for (int64_t start = 0; start < a.m; start += whole) {
    const int64_t stop = std::min(a.m, start + whole), height = stop - start;
    Job j{a, x, start, {}, {}, 1.0f};
    if (a.table) take_table(j);
    // Calls f with the rows from one to another as tiles take them: as many as one can, then 4, 2, 1.
    auto tiled = [&](int64_t from, int64_t to, auto&& f) {
      for (int64_t row = from; row < to;) {
        const int64_t left = to - row;
        const int taken = left >= most ? most : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        f(row, taken);
        row += taken;
      }
    };
    auto prepared = [&](int64_t from, int64_t to) {
      tiled(from, to, [&](int64_t row, int taken) {
        prepare(row, taken, x.from(row - start, padded));
      });
    };
    auto product = [&](int64_t from, int64_t to, int64_t p) {
      tiled(from, to, [&](int64_t row, int taken) {
        digits == 1 ? rows<1>(j, panel + p, row, taken) : rows<2>(j, panel + p, row, taken);
      });
    };
    // Where the rows of a piece begin.
    auto cut = [&](int64_t i, int64_t pieces, int64_t unit) {
      return i >= pieces ? stop : start + height * i / pieces / unit * unit;
    };
    // A short piece of work is done before a thread has woken up.
    const bool few = height * padded * (a.last - a.first) < (1 << 17);
    const int64_t tiles = height / most;
    if (few || (panels * a.chunks * kPanel * 4 * a.bits <= kNearBytes &&
                tiles >= 2 * pool.threads())) {
      // All weights stay near a core: it takes rows from one end to the other.
      const int64_t pieces = few ? 1
                             : tiles < 8 * pool.threads()
                                 ? pool.threads()
                                 : std::min<int64_t>(tiles / 2, 16 * pool.threads());
      // Where each takes just one, even pieces matter more than whole tiles.
      const int64_t unit = pieces > pool.threads() ? most : 2;
      pool.each((int)pieces, [&](int i) {
        const int64_t from = cut(i, pieces, unit), to = cut(i + 1, pieces, unit);
        prepared(from, to);
        for (int64_t p = 0; p < panels; p++) product(from, to, p);
      });
      continue;
    }
    // All that follows sees the same tiles: their rows count from the start.
    const int64_t cuts =
        height * a.k < 16384 ? 1 : std::clamp<int64_t>(tiles, 1, 4 * pool.threads());
    pool.each((int)cuts, [&](int i) { prepared(cut(i, cuts, most), cut(i + 1, cuts, most)); });
    // Neighbouring panels go together, as a thread reads them in one stream.
    const int64_t items = (height + part - 1) / part * panels;
    const int64_t pieces = std::min<int64_t>(items, 8 * pool.threads());
    pool.each((int)pieces, [&](int i) {
      for (int64_t n = items * i / pieces; n < items * (i + 1) / pieces; n++) {
        const int64_t from = start + n / panels * part;
        product(from, std::min(stop, from + part), n % panels);
      }
    });
  }
}

void matmul(const Matmul& a, const Pool& pool) {
  const auto prepare = [&](int64_t row, int height, const Rounded& x) {
    quantize_rows(a, row, height, x);
  };
  products(a, prepare, pool);
}

}  // namespace jom
