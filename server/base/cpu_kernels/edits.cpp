// Applies a step's edits in place to packed rows of a layer's output (edit_plan.py has the same in torch's products):
//
//   h[row] += sum_i scale_i act_i(h[row] . A[column_i] + b[column_i]) U[column_i]
//
// Nothing is gathered: a row reads its columns directly from the bank, and rows of one prompt find them in the cache.
// Sums follow the order of the columns, so a row's result does not depend on the other rows.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "vector.h"

namespace reftserve {
namespace {

// A column's activation: the numbers of `Activation` in interventions/columns.py.
enum EditActivation : int8_t { kLinear = 0, kRelu, kGelu, kTanh, kSigmoid, kSilu };

float edit_activation(float x, int8_t activation) {
  switch (activation) {
    case kRelu: return x < 0.0f ? 0.0f : x;
    case kGelu: return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f));
    case kTanh: return std::tanh(x);
    case kSigmoid: return 1.0f / (1.0f + std::exp(-x));
    case kSilu: return x / (1.0f + std::exp(-x));
    default: return x;
  }
}

// Rows of the bank: A, U [rows, size], b [rows], act [rows].
struct Bank {
  const float *A, *b, *U;
  const int8_t* act;
  int64_t size;

  // y[m] = act(x . A[columns[m]] + b[columns[m]]) * scale[m]; each load of x serves M columns.
  template <int M>
  void read(const float* x, const int64_t* columns, const float* scale, float* y) const {
    Vec sums[M] = {};
    for_each_vector(size, [&](int64_t at, int64_t count) {
      const Vec value = load_part(x + at, count);
      for (int m = 0; m < M; ++m) sums[m] += value * load_part(A + columns[m] * size + at, count);
    });
    for (int m = 0; m < M; ++m) y[m] = edit_activation(sum(sums[m]) + b[columns[m]], act[columns[m]]) * scale[m];
  }

  // x += sum_m y[m] U[columns[m]].
  void write(float* x, const int64_t* columns, const float* y, int64_t rank) const {
    for_each_vector(size, [&](int64_t at, int64_t count) {
      Vec value = load_part(x + at, count);
      for (int64_t m = 0; m < rank; ++m) value += y[m] * load_part(U + columns[m] * size + at, count);
      store_part(x + at, value, count);
    });
  }
};

// Edits hidden [tokens, size] at rows [edited]. Row i has the columns and scales [groups, rank] of group owners[i], up
// to the first column 0: the bank's row 0 belongs to no intervention.
void edit_rows(at::Tensor& hidden, const at::Tensor& rows, const at::Tensor& owners, const at::Tensor& columns,
               const at::Tensor& scale, const at::Tensor& A, const at::Tensor& b, const at::Tensor& U,
               const at::Tensor& act) {
  for (const at::Tensor& tensor : {hidden, rows, owners, columns, scale, A, b, U, act})
    TORCH_CHECK(tensor.is_contiguous(), "edit_rows reads memory in order; a tensor of sizes ", tensor.sizes(), " is a view");
  const int64_t rank = columns.size(1), size = hidden.size(1), edited = rows.size(0);
  const Bank bank{A.const_data_ptr<float>(), b.const_data_ptr<float>(), U.const_data_ptr<float>(),
                  act.const_data_ptr<int8_t>(), size};
  const int64_t *row = rows.const_data_ptr<int64_t>(), *owner = owners.const_data_ptr<int64_t>();
  const int64_t* all_columns = columns.const_data_ptr<int64_t>();
  const float* all_scales = scale.const_data_ptr<float>();
  float* all_rows = hidden.data_ptr<float>();
  at::Tensor products = at::empty({edited, rank}, at::kFloat);
  float* all_products = products.data_ptr<float>();
  for_rows(edited, 2 * rank * size, [&](int64_t index) {
    const int64_t* mine = all_columns + owner[index] * rank;
    const float* scales = all_scales + owner[index] * rank;
    const int64_t used = std::find(mine, mine + rank, 0) - mine;
    float *x = all_rows + row[index] * size, *y = all_products + index * rank;
    by_fours(used, [&]<int M>(int64_t first) { bank.read<M>(x, mine + first, scales + first, y + first); });
    bank.write(x, mine, y, used);
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(reftserve, library) {
  library.def(
      "edit_rows(Tensor(a!) hidden, Tensor rows, Tensor owners, Tensor columns, Tensor scale, Tensor A, Tensor b, "
      "Tensor U, Tensor act) -> ()");
}
TORCH_LIBRARY_IMPL(reftserve, CPU, library) { library.impl("edit_rows", &edit_rows); }

}  // namespace reftserve
