// Activations of gated MLPs, sixteen numbers at once.
#pragma once

#include "vector.h"

namespace reftserve {

// The numbers that Python passes (server/base/fused.py).
enum Activation : int64_t { kSilu = 0, kGeluTanh = 1 };

// Both are x * sigmoid(argument). For gelu's tanh form the argument is 2 u, with u as in Hendrycks and Gimpel 2016.
constexpr float kTwiceRoot = 1.5957691216057308f;  // 2 sqrt(2 / pi)
constexpr float kCubic = 0.044715f;
inline Vec sigmoid_argument(Vec x, int64_t activation) {
  return activation == kSilu ? x : kTwiceRoot * (x + kCubic * x * x * x);
}

inline Vec activate(Vec x, int64_t activation) { return x / (exp(-sigmoid_argument(x, activation)) + 1.0f); }

// The derivative.
inline Vec activate_slope(Vec x, int64_t activation) {
  const Vec sigmoid = 1.0f / (exp(-sigmoid_argument(x, activation)) + 1.0f);
  const Vec inner = activation == kSilu ? x : kTwiceRoot * (x + 3.0f * kCubic * x * x * x);
  return sigmoid * (1.0f + inner * (1.0f - sigmoid));
}

}  // namespace reftserve
