// Int8 linear layers: activations are rounded per row and weights per output channel. Integer products are exact, so a
// row's result does not depend on the other rows. torch's `_int_mm` computes large products. This file rounds inputs,
// scales and splits outputs in one pass each, and computes a gated MLP without floats in memory.
//
// *Precise* layers round twice: the remainder of the first rounding, at most half a step, is rounded to 1/254 of a step
// and multiplied as further rows of the same product. Then only the weights are inexact.
#include <ATen/core/Tensor.h>
#include <ATen/ops/_int_mm.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "activation.h"
#include "vector.h"

namespace reftserve {
namespace {

constexpr float kMax = 127.0f;
constexpr float kTiny = 1e-12f;           // keeps the scale of a row of zeros above zero
constexpr float kResidualSteps = 254.0f;  // half a step is 127 of these

// Up to this many rows, reading the weights bounds a product, and plain loops are faster than torch's product.
constexpr int64_t kFewRows = 8;

// Rows that share one read of a channel's weights in the plain loops.
constexpr int64_t kTile = 64;

// Without these instructions torch's product is many times slower than our loops.
bool has_fast_int_mm() {
#if defined(__x86_64__)
  static const bool has_vnni = __builtin_cpu_supports("avx512vnni");
  return has_vnni;
#else
  return false;
#endif
}

// products[row * stride] = x[row] . weight for M rows; the loop compiles to multiply-adds of sixteen-bit pairs.
template <int M>
void dot_rows(const int16_t* __restrict x, const int8_t* __restrict weight, int64_t size, int32_t* __restrict products,
              int64_t stride) {
  int32_t sums[M] = {};
  for (int64_t k = 0; k < size; ++k) {
    const int16_t value = weight[k];
    for (int m = 0; m < M; ++m) sums[m] += int32_t(value) * int32_t(x[m * size + k]);
  }
  for (int m = 0; m < M; ++m) products[m * stride] = sums[m];
}

// The exact product of integers [rows, size] and weight [out, size]: [rows, out] int32.
at::Tensor product(const at::Tensor& integers, const at::Tensor& weight) {
  const int64_t rows = integers.size(0), size = integers.size(1), out = weight.size(0);
  if (rows > kFewRows && has_fast_int_mm()) return at::_int_mm(integers, weight.t());
  at::Tensor products = at::empty({rows, out}, at::kInt);
  const int8_t* narrow = integers.const_data_ptr<int8_t>();
  thread_local std::vector<int16_t> wide;
  wide.assign(narrow, narrow + rows * size);
  const int16_t* x = wide.data();  // `wide` is thread-local; the threads below must read this one
  const int8_t* weights = weight.const_data_ptr<int8_t>();
  int32_t* to = products.data_ptr<int32_t>();
  for (int64_t tile = 0; tile < rows; tile += kTile) {
    const int64_t count = std::min(kTile, rows - tile);
    const int16_t* from = x + tile * size;
    int32_t* first_row = to + tile * out;
    for_rows(out, size * count, [&](int64_t channel) {
      const int8_t* row = weights + channel * size;
      by_fours(count, [&]<int M>(int64_t first) {
        dot_rows<M>(from + first * size, row, size, first_row + first * out + channel, out);
      });
    });
  }
  return products;
}

// Rounded rows [rows, size], with the remainders' rows after them if precise, and each row's scale.
struct Rounded {
  at::Tensor integers, scales;
  bool precise;
  int64_t rows, size;

  Rounded(int64_t rows, int64_t size, bool precise)
      : integers(at::empty({precise ? 2 * rows : rows, size}, at::kChar)),
        scales(at::empty({rows}, at::kFloat)), precise(precise), rows(rows), size(size) {}

  // Rounds one row of floats.
  void round(int64_t row, const float* from) {
    Vec largest{}, nothing{};
    for_each_vector(size, [&](int64_t at, int64_t count) {
      const Vec value = load_part(from + at, count), magnitude = value < 0.0f ? -value : value;
      largest = magnitude > largest ? magnitude : largest;
      nothing += value * 0.0f;
    });
    // An infinity or NaN makes `nothing` NaN, so that the whole row becomes NaN.
    const float scale = std::max(maximum(largest), kTiny) * (1.0f / kMax) + sum(nothing);
    scales.data_ptr<float>()[row] = scale;
    int8_t* to = integers.data_ptr<int8_t>() + row * size;
    int8_t* rest = to + rows * size;
    const float inverse = std::isfinite(scale) ? 1.0f / scale : 0.0f;
    for_each_vector(size, [&](int64_t at, int64_t count) {
      const Vec exact = std::isfinite(scale) ? load_part(from + at, count) * inverse : Vec{};
      const Vec rounded = round_even(exact);
      store_bytes(to + at, rounded, count);
      if (precise) store_bytes(rest + at, round_even((exact - rounded) * kResidualSteps), count);
    });
  }

  static void store_bytes(int8_t* to, Vec value, int64_t count) {
    const ByteVec bytes = __builtin_convertvector(__builtin_convertvector(value, IntVec), ByteVec);
    std::memcpy(to, &bytes, count);
  }
};

// Converts products to floats: x W^T + b of one row, for columns [at, at + count).
struct Scaled {
  const int32_t* products;
  const float *row_scales, *channel_scales, *bias;
  int64_t rows, out;
  bool precise;

  Scaled(const at::Tensor& products, const Rounded& x, const at::Tensor& scale, const std::optional<at::Tensor>& bias)
      : products(products.const_data_ptr<int32_t>()), row_scales(x.scales.const_data_ptr<float>()),
        channel_scales(scale.const_data_ptr<float>()), bias(bias ? bias->const_data_ptr<float>() : nullptr),
        rows(x.rows), out(products.size(1)), precise(x.precise) {}

  Vec at(int64_t row, int64_t column, int64_t count) const {
    Vec value = floats(products + row * out + column, count);
    if (precise) value += floats(products + (rows + row) * out + column, count) * (1.0f / kResidualSteps);
    value = value * row_scales[row] * load_part(channel_scales + column, count);
    return bias ? value + load_part(bias + column, count) : value;
  }

  static Vec floats(const int32_t* from, int64_t count) {
    IntVec integers{};
    std::memcpy(&integers, from, count * sizeof(int32_t));
    return __builtin_convertvector(integers, Vec);
  }
};

Rounded rounded_rows(const at::Tensor& x, bool precise) {
  const at::Tensor dense = x.contiguous();
  const int64_t size = dense.size(-1);
  Rounded rounded(dense.numel() / size, size, precise);
  const float* from = dense.const_data_ptr<float>();
  for_rows(rounded.rows, size, [&](int64_t row) { rounded.round(row, from + row * size); });
  return rounded;
}

at::Tensor output_like(const at::Tensor& x, int64_t size) {
  auto sizes = x.sizes().vec();
  sizes.back() = size;
  return at::empty(sizes, x.options());
}

// x W^T + b, split into outputs of these sizes: layers with the same input are one product.
std::vector<at::Tensor> int8_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale,
                                    const std::optional<at::Tensor>& bias, bool precise, at::IntArrayRef sizes) {
  const Rounded rounded = rounded_rows(x, precise);
  TORCH_CHECK(weight.size(1) == rounded.size, "a layer that reads ", weight.size(1), " numbers is given ", rounded.size);
  const at::Tensor products = product(rounded.integers, weight);
  const Scaled scaled(products, rounded, scale, bias);
  std::vector<at::Tensor> outs;
  for (const int64_t size : sizes) outs.push_back(output_like(x, size));
  for_rows(rounded.rows, scaled.out, [&](int64_t row) {
    int64_t column = 0;
    for (size_t part = 0; part < outs.size(); ++part) {
      float* to = outs[part].data_ptr<float>() + row * sizes[part];
      for_each_vector(sizes[part], [&](int64_t at, int64_t count) {
        store_part(to + at, scaled.at(row, column + at, count), count);
      });
      column += sizes[part];
    }
  });
  return outs;
}

// down(act(gate(x)) * up(x)); gate and up as one weight, `down` precise.
at::Tensor int8_gated_mlp(const at::Tensor& x, const at::Tensor& gate_up, const at::Tensor& gate_up_scale,
                          const std::optional<at::Tensor>& gate_up_bias, const at::Tensor& down,
                          const at::Tensor& down_scale, const std::optional<at::Tensor>& down_bias,
                          int64_t activation) {
  const Rounded rounded = rounded_rows(x, false);
  const at::Tensor products = product(rounded.integers, gate_up);
  const Scaled scaled(products, rounded, gate_up_scale, gate_up_bias);
  const int64_t size = scaled.out / 2;
  Rounded inner(rounded.rows, size, true);
  for_rows(rounded.rows, scaled.out, [&](int64_t row) {
    thread_local std::vector<float> gated;
    gated.resize(size);
    for_each_vector(size, [&](int64_t at, int64_t count) {
      store_part(gated.data() + at, activate(scaled.at(row, at, count), activation) * scaled.at(row, size + at, count), count);
    });
    inner.round(row, gated.data());
  });
  const at::Tensor inner_products = product(inner.integers, down);
  const Scaled result(inner_products, inner, down_scale, down_bias);
  at::Tensor out = output_like(x, result.out);
  float* to = out.data_ptr<float>();
  for_rows(rounded.rows, result.out, [&](int64_t row) {
    for_each_vector(result.out, [&](int64_t at, int64_t count) {
      store_part(to + row * result.out + at, result.at(row, at, count), count);
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(reftserve, library) {
  library.def(
      "int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, bool precise, int[] sizes) -> Tensor[]");
  library.def(
      "int8_gated_mlp(Tensor x, Tensor gate_up, Tensor gate_up_scale, Tensor? gate_up_bias, Tensor down, "
      "Tensor down_scale, Tensor? down_bias, int activation) -> Tensor");
}
TORCH_LIBRARY_IMPL(reftserve, CPU, library) {
  library.impl("int8_linear", &int8_linear);
  library.impl("int8_gated_mlp", &int8_gated_mlp);
}

}  // namespace reftserve
