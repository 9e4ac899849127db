// y = x W^T + b in float32. A row's sums are taken in one order whatever stands beside it, so its result is the same to
// the bit in any batch.
//
//   x [rows, in]   weight [panels, in, kPanel]: kPanel output channels side by side, the last panel padded with zeros
//
// A task is one panel and up to kRows rows, kTile at a time: the panel comes from memory once and is read again from the
// second-level cache, where the next panel is on its way meanwhile, as are the rows. So memory bounds it at a few rows,
// arithmetic at many.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>

#include "vector.h"

namespace reftserve {
namespace {

constexpr int64_t kVectors = 3;
constexpr int64_t kPanel = kVectors * kWidth;
constexpr int64_t kTile = 8;
constexpr int64_t kRows = 128;

// out[row, :] = x[row] . panel + bias for R rows. `ahead`: the next panel, of which a part is fetched meanwhile.
template <int R>
void multiply_tile(const float* x, int64_t in, const float* panel, const float* bias, float* out, int64_t stride,
                   int64_t columns, const float* ahead) {
  Vec sums[R][kVectors] = {};
  for (int64_t k = 0; k < in; ++k) {
    Vec weight[kVectors];
    for (int v = 0; v < kVectors; ++v) weight[v] = load(panel + k * kPanel + v * kWidth);
    if (ahead)
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(ahead + k * kPanel + v * kWidth, 0, 2);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kVectors; ++v) sums[r][v] += x[r * in + k] * weight[v];
  }
  for (int r = 0; r < R; ++r)
    for (int64_t v = 0; v * kWidth < columns; ++v) {
      const int64_t count = std::min(kWidth, columns - v * kWidth);
      const Vec sum = bias ? sums[r][v] + load_part(bias + v * kWidth, count) : sums[r][v];
      store_part(out + r * stride + v * kWidth, sum, count);
    }
}

// weight [out, in] as panels.
at::Tensor pack_linear(const at::Tensor& weight) {
  const at::Tensor dense = weight.contiguous();
  const int64_t out = dense.size(0), in = dense.size(1), panels = (out + kPanel - 1) / kPanel;
  at::Tensor packed = at::zeros({panels, in, kPanel}, dense.options());
  const float* from = dense.const_data_ptr<float>();
  float* to = packed.data_ptr<float>();
  for_each(panels, [&](int64_t panel) {
    for (int64_t column = panel * kPanel; column < std::min(out, (panel + 1) * kPanel); ++column)
      for (int64_t k = 0; k < in; ++k) to[(panel * in + k) * kPanel + column % kPanel] = from[column * in + k];
  });
  return packed;
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias, int64_t out) {
  const at::Tensor dense = x.contiguous();
  const int64_t in = dense.size(-1), rows = dense.numel() / in, panels = packed.size(0);
  auto sizes = dense.sizes().vec();
  sizes.back() = out;
  at::Tensor result = at::empty(sizes, dense.options());
  const float *from = dense.const_data_ptr<float>(), *weights = packed.const_data_ptr<float>();
  const float* added = bias ? bias->const_data_ptr<float>() : nullptr;
  float* to = result.data_ptr<float>();
  // All panels for the first rows, then for the next: the threads stay side by side in the weights.
  for_each((rows + kRows - 1) / kRows * panels, [&](int64_t task) {
    const int64_t panel = task % panels, begin = task / panels * kRows, end = std::min(rows, begin + kRows);
    const int64_t column = panel * kPanel, columns = std::min(kPanel, out - column);
    const float* weight = weights + panel * in * kPanel;
    // The thread that takes this panel takes the one after the next, most likely.
    const int64_t next = panel + at::get_num_threads();
    const float* ahead = next < panels ? weights + next * in * kPanel : nullptr;
    const auto tile = [&]<int R>(int64_t row) {
      multiply_tile<R>(from + row * in, in, weight, added ? added + column : nullptr, to + row * out + column, out,
                       columns, row == begin + kTile ? ahead : nullptr);
    };
    int64_t row = begin;
    for (; row + kTile <= end; row += kTile) tile.template operator()<kTile>(row);
    by_fours(end - row, [&]<int R>(int64_t rest) { tile.template operator()<R>(row + rest); });
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(reftserve, library) {
  library.def("pack_linear(Tensor weight) -> Tensor");
  library.def("linear(Tensor x, Tensor packed, Tensor? bias, int out) -> Tensor");
}
TORCH_LIBRARY_IMPL(reftserve, CPU, library) {
  library.impl("pack_linear", &pack_linear);
  library.impl("linear", &linear);
}

}  // namespace reftserve
