// What happens to a result before it is stored: bias, activation function, type.
#ifndef JOM_EPILOGUE_H_
#define JOM_EPILOGUE_H_

#include "isa.h"

namespace jom {

enum class Activation : int { kNone, kRelu, kGelu, kGeluTanh, kSilu, kSigmoid, kTanh, kCount };

// A NaN passes, as comparisons with one choose the second operand.
JOM_INLINE Floats clamp(Floats x, float limit) {
  return least(floats(limit), most(floats(-limit), x));
}

template <int N>
JOM_INLINE Floats polynomial(Floats x, const float (&c)[N]) {
  Floats y = floats(c[0]);
  for (int i = 1; i < N; i++) y = y * x + floats(c[i]);
  return y;
}

// Rational minimax approximations, within 4 units in the last place of float32 (near 1: 1e-7).
JOM_INLINE Floats erf_of(Floats x) {
  constexpr float p[] = {0.00022905065861350646f, 0.0034082910107109506f, 0.050955695062380861f,
                         0.18520832239976145f, 1.128379143519084f};
  constexpr float q[] = {-1.1791602954361697e-7f, 0.000023547966471313185f,
                         0.0010179625278914885f, 0.014070470171167667f, 0.11098505178285362f,
                         0.49746925110067538f, 1.0f};
  x = clamp(x, 3.832506856900711f);
  Floats square = x * x;
  return x * polynomial(square, p) / polynomial(square, q);
}

JOM_INLINE Floats tanh_of(Floats x) {
  constexpr float p[] = {-2.76076847742355e-16f, 2.00018790482477e-13f, -8.60467152213735e-11f,
                         5.12229709037114e-08f, 1.48572235717979e-05f, 6.37261928875436e-04f,
                         4.89352455891786e-03f};
  constexpr float q[] = {1.19825839466702e-06f, 1.18534705686654e-04f, 2.26843463243900e-03f,
                         4.89352518554385e-03f};
  x = clamp(x, 7.90531110763549805f);
  Floats square = x * x;
  return x * polynomial(square, p) / polynomial(square, q);
}

JOM_INLINE Floats activated(Floats x, Activation act) {
  const Floats half = floats(0.5f), one = floats(1.0f);
  switch (act) {
    case Activation::kRelu: return most(floats(0.0f), x);
    case Activation::kGelu: return half * x * (one + erf_of(x * floats(0.70710678118654752f)));
    case Activation::kGeluTanh: {
      Floats cube = x * x * x;
      Floats inner = floats(0.79788456080286536f) * (x + floats(0.044715f) * cube);
      return half * x * (one + tanh_of(inner));
    }
    case Activation::kSilu: return half * x * (one + tanh_of(half * x));
    case Activation::kSigmoid: return half * (one + tanh_of(half * x));
    case Activation::kTanh: return tanh_of(x);
    default: return x;
  }
}

inline void store_one(void* y, int64_t at, bool bf16, float x) {
  if (bf16) {
    static_cast<uint16_t*>(y)[at] = to_bf16(x);
  } else {
    static_cast<float*>(y)[at] = x;
  }
}

// Stores the first n lanes, as float32 or bfloat16.
JOM_INLINE void store_as(void* y, int64_t at, bool bf16, Floats x, int n) {
  if (!bf16) {
    float* p = static_cast<float*>(y) + at;
    n == kLanes ? store(p, x) : store(p, x, n);
    return;
  }
  float all[kLanes];
  store(all, x);
  for (int i = 0; i < n; i++) store_one(y, at + i, true, all[i]);
}

}  // namespace jom

#endif  // JOM_EPILOGUE_H_
