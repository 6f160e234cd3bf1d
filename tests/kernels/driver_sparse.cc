// Products with weights of which only what is kept is stored.
#include "driver.h"
#include "sparse/cpu.h"

namespace {

// Values of any of the types, and what they are.
struct Values {
  Values(Random& r, int64_t n, jom::Kind kind)
      : kind(kind), numbers(r, kind == jom::Kind::kInt8 ? 0 : n, kind == jom::Kind::kBf16),
        codes(kind == jom::Kind::kInt8 ? n : 0) {
    for (size_t i = 0; i < codes.size; i++) codes.data[i] = (int8_t)r.engine();
  }
  const void* data() const { return kind == jom::Kind::kInt8 ? codes.data : numbers.data(); }
  float at(int64_t i) const { return kind == jom::Kind::kInt8 ? codes.data[i] : numbers.wide[i]; }
  jom::Kind kind;
  Numbers numbers;
  Exact<int8_t> codes;
};

// Compares with the dense matrix [k, n].
bool agrees(const jom::Rows& a, const Numbers& x, const std::vector<double>& dense, const Results& y,
            const char* what) {
  for (int64_t i = 0; i < a.m; i++) {
    bool finite = true;
    for (int64_t c = 0; c < a.k; c++) finite = finite && std::isfinite(x.wide[i * a.k + c]);
    for (int64_t j = 0; j < a.n; j++) {
      double want = 0, size = 0;
      for (int64_t c = 0; c < a.k; c++) {
        const double term = x.wide[i * a.k + c] * dense[c * a.n + j];
        want += term, size += std::fabs(term);
      }
      const int64_t at = i * a.n + j;
      if (finite ? !y.near(at, want, 1e-5 * size, what) : !y.is_nan(at, what)) return false;
    }
  }
  return true;
}

void fill(Random& r, jom::Rows& a, const Values& v, Numbers& x, Results& y) {
  spoil(r, x);
  a.x = x.data(), a.x_bf16 = x.bf16, a.values = v.data(), a.kind = v.kind;
  a.y = y.data(), a.y_bf16 = y.bf16;
}

}  // namespace

bool sparse_blocks(Random& r) {
  jom::Blocks a{};
  a.unit = 4 << r.upto(2);
  const int64_t runs = r.one_in(8) ? r.upto(150) : r.upto(20);
  a.m = r.extent(70), a.k = runs * a.unit, a.n = r.extent(100);
  const int kept = r.upto(4);
  Exact<int32_t> starts(a.n + 1);
  std::vector<uint16_t> found;
  for (int64_t j = 0; j < a.n; j++) {
    starts.data[j] = (int32_t)found.size();
    for (int64_t i = 0; i < runs; i++) {
      if (r.upto(3) < kept) found.push_back((uint16_t)i);
    }
  }
  starts.data[a.n] = (int32_t)found.size();
  // Units that are in no column are there, but are not used.
  for (int i = r.upto(2); i && runs; i--) found.push_back((uint16_t)r.upto((int)runs - 1));
  a.units = (int64_t)found.size();
  Exact<uint16_t> index(found.size());
  for (size_t i = 0; i < found.size(); i++) index.data[i] = found[i];
  Values v(r, a.units * a.unit, (jom::Kind)r.upto(2));
  Exact<float> scale(r.one_in(2) ? a.n : 0);
  for (size_t i = 0; i < scale.size; i++) scale.data[i] = (float)(1 + r.upto(30)) / 8.0f;
  std::vector<double> dense(a.k * a.n);
  for (int64_t j = 0; j < a.n; j++) {
    for (int64_t u = starts.data[j]; u < starts.data[j + 1]; u++) {
      for (int t = 0; t < a.unit; t++) {
        const double value = v.at(u * a.unit + t) * (scale.data ? scale.data[j] : 1.0);
        dense[((int64_t)found[u] * a.unit + t) * a.n + j] = value;
      }
    }
  }
  Numbers x(r, a.m * a.k, r.one_in(3));
  Results y(a.m * a.n, r.one_in(3));
  fill(r, a, v, x, y);
  a.index = index.data, a.starts = starts.data, a.scale = scale.data;
  if (const char* what = check(a)) return std::printf("refused: %s\n", what), false;
  blocks(a, Threads(r));
  return agrees(a, x, dense, y, "blocks");
}

bool sparse_pairs(Random& r) {
  jom::Pairs a{};
  a.m = r.extent(40), a.k = r.one_in(8) ? r.upto(700) : r.extent(140), a.n = r.extent(100);
  a.panels = (a.n + 15) / 16, a.chunks = (a.k + 31) / 32;
  Values v(r, a.panels * a.chunks * 256, r.one_in(2) ? jom::Kind::kFloat : jom::Kind::kBf16);
  Exact<uint32_t> places(a.panels * a.chunks * 16);
  std::vector<double> dense(a.k * a.n);
  for (int64_t i = 0; i < (int64_t)places.size; i++) {
    const int64_t j = i / 16 / (a.chunks ? a.chunks : 1) * 16 + i % 16;
    const int64_t chunk = i / 16 % a.chunks;
    uint32_t word = 0;
    for (int s = 0; s < 8; s++) {
      const uint32_t one = (uint32_t)r.upto(3), two = (one + 1 + (uint32_t)r.upto(2)) % 4;
      word |= (one | two << 2) << (4 * s);
      for (int t = 0; t < 2; t++) {
        const int64_t row = chunk * 32 + 4 * s + (t ? two : one);
        if (row < a.k && j < a.n) dense[row * a.n + j] = v.at(i / 16 * 256 + (s * 2 + t) * 16 + i % 16);
      }
    }
    places.data[i] = word;
  }
  Numbers x(r, a.m * a.k, r.one_in(3));
  Results y(a.m * a.n, r.one_in(3));
  fill(r, a, v, x, y);
  a.places = places.data;
  if (const char* what = check(a)) return std::printf("refused: %s\n", what), false;
  pairs(a, Threads(r));
  return agrees(a, x, dense, y, "pairs");
}
