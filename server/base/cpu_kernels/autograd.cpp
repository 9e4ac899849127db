// Backward passes through the frozen base. Only activations get gradients, never weights or cached keys and values, and
// gradients cannot be differentiated again. The engine computes in inference mode, which skips this file.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "kernels.h"

namespace reftserve {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::tensor_list;

struct Linear : Function<Linear> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& packed,
                            const std::optional<at::Tensor>& bias, at::IntArrayRef sizes) {
    context->save_for_backward({packed});
    context->saved_data["sizes"] = sizes.vec();
    return reftserve::linear(x, packed, bias, sizes);
  }
  static tensor_list backward(AutogradContext* context, const tensor_list& gradients) {
    const at::Tensor packed = context->get_saved_variables()[0];
    return {linear_transposed(gradients[0], packed, context->saved_data["sizes"].toIntVector()), {}, {}, {}};
  }
};

struct RmsNorm : Function<RmsNorm> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight, double epsilon) {
    context->save_for_backward({x, weight});
    context->saved_data["epsilon"] = epsilon;
    return rms_norm(x, weight, epsilon);
  }
  static tensor_list backward(AutogradContext* context, const tensor_list& gradients) {
    const auto saved = context->get_saved_variables();
    return {rms_norm_backward(gradients[0], saved[0], saved[1], context->saved_data["epsilon"].toDouble()), {}, {}};
  }
};

struct GatedActivation : Function<GatedActivation> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& gate_up, int64_t activation) {
    context->save_for_backward({gate_up});
    context->saved_data["activation"] = activation;
    return gated_activation(gate_up, activation);
  }
  static tensor_list backward(AutogradContext* context, const tensor_list& gradients) {
    const at::Tensor gate_up = context->get_saved_variables()[0];
    return {gated_activation_backward(gradients[0], gate_up, context->saved_data["activation"].toInt()), {}};
  }
};

struct Rotated : Function<Rotated> {
  static tensor_list forward(AutogradContext* context, const at::Tensor& query, const at::Tensor& key,
                             const at::Tensor& cosines, const at::Tensor& sines, int64_t dim) {
    context->save_for_backward({cosines, sines});
    context->saved_data["dim"] = dim;
    auto [rotated_query, rotated_key] = rotated(query, key, cosines, sines, dim);
    return {rotated_query, rotated_key};
  }
  static tensor_list backward(AutogradContext* context, const tensor_list& gradients) {
    const auto saved = context->get_saved_variables();
    // The transpose of [[c, -s], [s', c']] is [[c, s'], [-s, c']].
    const at::Tensor back = saved[1].roll(saved[1].size(-1) / 2, -1).neg();
    auto [query, key] = rotated(gradients[0], gradients[1], saved[0], back, context->saved_data["dim"].toInt());
    return {query, key, {}, {}, {}};
  }
};

// `before` is a vector, which counts as one argument; each tensor of a list would need a gradient.
struct SpanAttention : Function<SpanAttention> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& query, const at::Tensor& key,
                            const at::Tensor& value, const std::vector<at::Tensor>& before, at::IntArrayRef rows,
                            double scale, int64_t window) {
    context->save_for_backward({query, key, value});
    context->saved_data["before"] = before;
    context->saved_data["rows"] = rows.vec();
    context->saved_data["scale"] = scale;
    context->saved_data["window"] = window;
    return span_attention(query, key, value, before, rows, scale, window);
  }
  static tensor_list backward(AutogradContext* context, const tensor_list& gradients) {
    const auto saved = context->get_saved_variables();
    auto& data = context->saved_data;
    auto [query, key, value] = span_attention_backward(
        gradients[0], saved[0], saved[1], saved[2], data["before"].toTensorVector(), data["rows"].toIntVector(),
        data["scale"].toDouble(), data["window"].toInt());
    return {query, key, value, {}, {}, {}, {}};
  }
};

std::tuple<at::Tensor, at::Tensor> apply_rotated(const at::Tensor& query, const at::Tensor& key,
                                                 const at::Tensor& cosines, const at::Tensor& sines, int64_t dim) {
  const tensor_list both = Rotated::apply(query, key, cosines, sines, dim);
  return {both[0], both[1]};
}

// An operation in place keeps no input for a backward pass.
void rotate_without_way_back(at::Tensor& query, at::Tensor& key, const at::Tensor& cosines, const at::Tensor& sines,
                             int64_t dim) {
  TORCH_CHECK(!at::GradMode::is_enabled() || !(query.requires_grad() || key.requires_grad()),
              "what needs gradients is rotated by `rotated`");
  rotate(query, key, cosines, sines, dim);
}

}  // namespace

TORCH_LIBRARY_IMPL(reftserve, AutogradCPU, library) {
  library.impl("rotate", &rotate_without_way_back);
  library.impl("linear", [](const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                            at::IntArrayRef sizes) { return Linear::apply(x, packed, bias, sizes); });
  library.impl("rms_norm", [](const at::Tensor& x, const at::Tensor& weight, double epsilon) {
    return RmsNorm::apply(x, weight, epsilon);
  });
  library.impl("gated_activation", [](const at::Tensor& gate_up, int64_t activation) {
    return GatedActivation::apply(gate_up, activation);
  });
  library.impl("rotated", &apply_rotated);
  library.impl("span_attention", [](const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                    at::TensorList before, at::IntArrayRef rows, double scale, int64_t window) {
    return SpanAttention::apply(query, key, value, before.vec(), rows, scale, window);
  });
}

}  // namespace reftserve
