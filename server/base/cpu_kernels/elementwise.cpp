// Elementwise operations of most decoders, each in one pass over the rows: RMS norm, gated activation, rotation.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "activation.h"
#include "kernels.h"
#include "vector.h"

namespace reftserve {

// x * weight / sqrt(mean(x^2) + epsilon), over the last dimension (Zhang and Sennrich 2019).
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double epsilon) {
  const at::Tensor dense = x.contiguous();
  at::Tensor out = at::empty(dense.sizes(), dense.options());
  const int64_t size = dense.size(-1), rows = dense.numel() / size;
  TORCH_CHECK(weight.numel() == size, "a norm of ", weight.numel(), " numbers is given ", size);
  const float *from = dense.const_data_ptr<float>(), *scale = weight.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  for_rows(rows, size, [&](int64_t row) {
    const float* x_row = from + row * size;
    Vec squares{};
    for_each_vector(size, [&](int64_t at, int64_t count) {
      const Vec value = load_part(x_row + at, count);
      squares += value * value;
    });
    const float norm = 1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + static_cast<float>(epsilon));
    for_each_vector(size, [&](int64_t at, int64_t count) {
      store_part(to + row * size + at, load_part(x_row + at, count) * norm * load_part(scale + at, count), count);
    });
  });
  return out;
}

// The gradient of x: norm (g - x norm^2 mean(g x)), where g = gradient of the output * weight.
at::Tensor rms_norm_backward(const at::Tensor& gradient, const at::Tensor& x, const at::Tensor& weight, double epsilon) {
  const at::Tensor dense = x.contiguous(), from_above = gradient.contiguous();
  at::Tensor out = at::empty(dense.sizes(), dense.options());
  const int64_t size = dense.size(-1), rows = dense.numel() / size;
  const float *from = dense.const_data_ptr<float>(), *scale = weight.const_data_ptr<float>();
  const float* slopes = from_above.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  for_rows(rows, size, [&](int64_t row) {
    const float *x_row = from + row * size, *slope = slopes + row * size;
    Vec squares{}, products{};
    for_each_vector(size, [&](int64_t at, int64_t count) {
      const Vec value = load_part(x_row + at, count);
      squares += value * value;
      products += value * (load_part(slope + at, count) * load_part(scale + at, count));
    });
    const float norm = 1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + static_cast<float>(epsilon));
    const float pull = norm * norm * sum(products) / static_cast<float>(size);
    for_each_vector(size, [&](int64_t at, int64_t count) {
      const Vec direct = load_part(slope + at, count) * load_part(scale + at, count);
      store_part(to + row * size + at, norm * (direct - load_part(x_row + at, count) * pull), count);
    });
  });
  return out;
}

// act(gate) * up for gate_up [..., gate then up].
at::Tensor gated_activation(const at::Tensor& gate_up, int64_t activation) {
  const at::Tensor dense = gate_up.contiguous();
  const int64_t size = dense.size(-1) / 2, rows = dense.numel() / (2 * size);
  auto sizes = dense.sizes().vec();
  sizes.back() = size;
  at::Tensor out = at::empty(sizes, dense.options());
  const float* from = dense.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  for_rows(rows, size, [&](int64_t row) {
    const float *gate = from + row * 2 * size, *up = gate + size;
    for_each_vector(size, [&](int64_t at, int64_t count) {
      store_part(to + row * size + at, activate(load_part(gate + at, count), activation) * load_part(up + at, count), count);
    });
  });
  return out;
}

// The gradient of gate_up, from the gradient of the output.
at::Tensor gated_activation_backward(const at::Tensor& gradient, const at::Tensor& gate_up, int64_t activation) {
  const at::Tensor dense = gate_up.contiguous(), from_above = gradient.contiguous();
  const int64_t size = dense.size(-1) / 2, rows = dense.numel() / (2 * size);
  at::Tensor out = at::empty(dense.sizes(), dense.options());
  const float *from = dense.const_data_ptr<float>(), *slopes = from_above.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  for_rows(rows, 2 * size, [&](int64_t row) {
    const float *gate = from + row * 2 * size, *up = gate + size, *slope = slopes + row * size;
    float *to_gate = to + row * 2 * size, *to_up = to_gate + size;
    for_each_vector(size, [&](int64_t at, int64_t count) {
      const Vec x = load_part(gate + at, count), above = load_part(slope + at, count);
      store_part(to_gate + at, above * load_part(up + at, count) * activate_slope(x, activation), count);
      store_part(to_up + at, above * activate(x, activation), count);
    });
  });
  return out;
}

// Rotates the first cosines.size(-1) numbers of each head in place (Su et al. 2021); pairs are (i, i + half).
//   query, key [rows, heads * dim], any row stride   cosines, sines [rows, rotated]
void rotate(at::Tensor& query, at::Tensor& key, const at::Tensor& cosines, const at::Tensor& sines, int64_t dim) {
  TORCH_CHECK(query.stride(-1) == 1 && key.stride(-1) == 1, "queries and keys must have dense rows");
  const at::Tensor cos = cosines.contiguous(), sin = sines.contiguous();
  const int64_t rows = query.size(0), width = cos.size(-1), half = width / 2;
  TORCH_CHECK(key.size(0) == rows && cos.size(0) == rows && sin.sizes() == cos.sizes(), "one rotation for each row");
  TORCH_CHECK(width <= dim && width % 2 == 0, "of a head of ", dim, " numbers ", width, " cannot be rotated");
  TORCH_CHECK(query.size(-1) % dim == 0 && key.size(-1) % dim == 0, "rows must be whole heads");
  const float *cos_rows = cos.const_data_ptr<float>(), *sin_rows = sin.const_data_ptr<float>();
  for (const at::Tensor& heads : {query, key}) {
    float* first = heads.data_ptr<float>();
    for_rows(rows, heads.size(-1), [&](int64_t row) {
      const float *c = cos_rows + row * width, *s = sin_rows + row * width;
      float* begin = first + row * heads.stride(0);
      for (float* x = begin; x < begin + heads.size(-1); x += dim)
        for_each_vector(half, [&](int64_t at, int64_t count) {
          const Vec low = load_part(x + at, count), high = load_part(x + half + at, count);
          store_part(x + at, low * load_part(c + at, count) - high * load_part(s + at, count), count);
          store_part(x + half + at,
                     high * load_part(c + half + at, count) + low * load_part(s + half + at, count), count);
        });
    });
  }
}

// The same into new dense tensors.
std::tuple<at::Tensor, at::Tensor> rotated(const at::Tensor& query, const at::Tensor& key, const at::Tensor& cosines,
                                           const at::Tensor& sines, int64_t dim) {
  at::Tensor new_query = query.clone(at::MemoryFormat::Contiguous), new_key = key.clone(at::MemoryFormat::Contiguous);
  rotate(new_query, new_key, cosines, sines, dim);
  return {new_query, new_key};
}

TORCH_LIBRARY_FRAGMENT(reftserve, library) {
  library.def("rotated(Tensor query, Tensor key, Tensor cosines, Tensor sines, int dim) -> (Tensor, Tensor)");
  library.def("rotate(Tensor(a!) query, Tensor(b!) key, Tensor cosines, Tensor sines, int dim) -> ()");
  library.def("rms_norm(Tensor x, Tensor weight, float epsilon) -> Tensor");
  library.def("gated_activation(Tensor gate_up, int activation) -> Tensor");
}
TORCH_LIBRARY_IMPL(reftserve, CPU, library) {
  library.impl("rotate", &rotate);
  library.impl("rotated", &rotated);
  library.impl("rms_norm", &rms_norm);
  library.impl("gated_activation", &gated_activation);
}

}  // namespace reftserve
