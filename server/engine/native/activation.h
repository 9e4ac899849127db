// Activations of gated MLPs, sixteen numbers at once.
#pragma once

#include "vector.h"

namespace reftserve {

// The numbers that Python passes (server/engine/fused.py).
enum Activation : int64_t { kSilu = 0, kGeluTanh = 1 };

inline Vec activate(Vec x, int64_t activation) {
  // gelu's tanh form is x * sigmoid(2 u), with u as in Hendrycks and Gimpel 2016.
  const Vec argument = activation == kSilu ? x : 1.5957691216057308f * (x + 0.044715f * x * x * x);
  return x / (exp(-argument) + 1.0f);
}

}  // namespace reftserve
