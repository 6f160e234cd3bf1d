// Any processor: vectors of the compiler. Included by isa.h, inside its namespace.

// Vectors of the compiler, which makes of them what the processor has.
struct Bytes { uint8_t v __attribute__((vector_size(64))); };
struct Ints { int32_t v __attribute__((vector_size(64))); };
struct Floats { float v __attribute__((vector_size(64))); };

JOM_INLINE Bytes load_bytes(const uint8_t* p) {
  Bytes r;
  std::memcpy(&r.v, p, 64);
  return r;
}
JOM_INLINE void store_bytes(uint8_t* p, Bytes a) { std::memcpy(p, &a.v, 64); }
template <int N>
JOM_INLINE Bytes bits_of(Bytes a, uint8_t mask) { return {(a.v >> N) & mask}; }
template <int N>
JOM_INLINE Bytes shift_up(Bytes a) { return {a.v << N}; }
JOM_INLINE Bytes either(Bytes a, Bytes b) { return {a.v | b.v}; }
JOM_INLINE Bytes lookup(const uint8_t* table, Bytes at) {
  for (int i = 0; i < 64; i++) at.v[i] = table[at.v[i]];
  return at;
}
JOM_INLINE Ints ints(int32_t x) { return {Ints{}.v + x}; }
JOM_INLINE Ints joined(Ints high, Ints low) { return {high.v * 256 + low.v}; }
// A call, or tiles take minutes to compile.
__attribute__((noinline)) inline void add_dot4(Ints& acc, const Bytes& w, int32_t four) {
  int8_t a[4];
  std::memcpy(a, &four, 4);
  for (int i = 0; i < kLanes; i++) {
    acc.v[i] += w.v[4 * i] * a[0] + w.v[4 * i + 1] * a[1] + w.v[4 * i + 2] * a[2] +
                w.v[4 * i + 3] * a[3];
  }
}
JOM_INLINE Ints dot4(Ints acc, const Bytes& w, int32_t four) {
  add_dot4(acc, w, four);
  return acc;
}
JOM_INLINE Floats floats(float x) { return {Floats{}.v + x}; }
JOM_INLINE Floats to_floats(Ints a) { return {__builtin_convertvector(a.v, decltype(Floats::v))}; }
JOM_INLINE Floats load(const float* p) {
  Floats r;
  std::memcpy(&r.v, p, 64);
  return r;
}
JOM_INLINE void store(float* p, Floats a) { std::memcpy(p, &a.v, 64); }
JOM_INLINE Floats operator+(Floats a, Floats b) { return {a.v + b.v}; }
JOM_INLINE Floats operator-(Floats a, Floats b) { return {a.v - b.v}; }
JOM_INLINE Floats operator*(Floats a, Floats b) { return {a.v * b.v}; }
JOM_INLINE Floats operator/(Floats a, Floats b) { return {a.v / b.v}; }
JOM_INLINE Floats least(Floats a, Floats b) { return {a.v < b.v ? a.v : b.v}; }
JOM_INLINE Floats most(Floats a, Floats b) { return {a.v > b.v ? a.v : b.v}; }

JOM_INLINE Ints to_ints(Floats whole) { return {__builtin_convertvector(whole.v, decltype(Ints::v))}; }
JOM_INLINE Ints operator+(Ints a, Ints b) { return {a.v + b.v}; }
JOM_INLINE Ints high_of(Ints a) { return {(a.v + 128) >> 8}; }
JOM_INLINE Ints low_of(Ints a, Ints high) { return {a.v - high.v * 256}; }
JOM_INLINE void store_codes(int8_t* p, Ints a) {
  for (int i = 0; i < kLanes; i++) p[i] = (int8_t)a.v[i];
}
JOM_INLINE int32_t sum_of(Ints a) {
  int32_t total = 0;
  for (int i = 0; i < kLanes; i++) total += a.v[i];
  return total;
}
