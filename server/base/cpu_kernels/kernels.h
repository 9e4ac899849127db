// Kernels with a backward pass (autograd.cpp). Each is described at its definition.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace reftserve {

// linear.cpp
at::Tensor linear(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                  at::IntArrayRef sizes);
at::Tensor linear_transposed(const at::Tensor& y, const at::Tensor& packed, at::IntArrayRef sizes);

// elementwise.cpp
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double epsilon);
at::Tensor rms_norm_backward(const at::Tensor& gradient, const at::Tensor& x, const at::Tensor& weight, double epsilon);
at::Tensor gated_activation(const at::Tensor& gate_up, int64_t activation);
at::Tensor gated_activation_backward(const at::Tensor& gradient, const at::Tensor& gate_up, int64_t activation);
void rotate(at::Tensor& query, at::Tensor& key, const at::Tensor& cosines, const at::Tensor& sines, int64_t dim);
std::tuple<at::Tensor, at::Tensor> rotated(const at::Tensor& query, const at::Tensor& key, const at::Tensor& cosines,
                                           const at::Tensor& sines, int64_t dim);

// span_attention.cpp
at::Tensor span_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                          at::TensorList before, at::IntArrayRef rows, double scale, int64_t window);
std::tuple<at::Tensor, at::Tensor, at::Tensor> span_attention_backward(
    const at::Tensor& gradient, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    at::TensorList before, at::IntArrayRef rows, double scale, int64_t window);

}  // namespace reftserve
