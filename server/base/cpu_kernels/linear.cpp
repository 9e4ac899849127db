// y = x W^T + b in float32, and y W for the backward pass, from the same packed weights. The order of a row's sums does
// not depend on the other rows, so a row's result is the same to the bit in any batch.
//
//   x [rows, in]   weight [panels, in, kPanel]: kPanel output channels a panel, the last panel padded with zeros.
//   Layers with the same x are concatenated; each starts at a new panel.
//
// A task multiplies one panel with up to kRows rows, in tiles of kTile rows. The first tile prefetches the panel from
// memory; the others read it from the second-level cache while the next panel is prefetched. So memory bounds a
// product of few rows, and arithmetic one of many. For y W, a task takes kPanel input channels. It first transposes
// their part of the panels, kChunk panels at a time, in that cache; this costs four shuffles for sixteen numbers.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "kernels.h"
#include "vector.h"

namespace reftserve {
namespace {

constexpr int64_t kVectors = 3;
constexpr int64_t kPanel = kVectors * kWidth;
constexpr int64_t kTile = 8;
constexpr int64_t kRows = 128;
constexpr int64_t kAhead = 32;  // input channels that the first tile prefetches: 6 kB
constexpr int64_t kChunk = 16;  // panels transposed at once: 150 kB

// out[row, :] = x[row, :depth] . panel + bias for R rows; x has row stride `in`. onto: add to out instead of the bias.
// ahead: weights to prefetch, as many as are read; prefetching past the end of memory is harmless.
template <int R, bool onto = false>
void multiply_tile(const float* x, int64_t in, int64_t depth, const float* panel, const float* bias, float* out,
                   int64_t stride, int64_t columns, const float* ahead) {
  Vec sums[R][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
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
      float* to = out + r * stride + v * kWidth;
      const float* added = onto ? to : bias ? bias + v * kWidth : nullptr;
      store_part(to, added ? sums[r][v] + load_part(added, count) : sums[r][v], count);
    }
}

// Calls tile<kTile>(row) for the rows [begin, end), and smaller tiles for the remainder.
template <class Tile>
void for_tiles(int64_t begin, int64_t end, const Tile& tile) {
  for (; begin + kTile <= end; begin += kTile) tile.template operator()<kTile>(begin);
  by_fours(end - begin, [&]<int R>(int64_t rest) { tile.template operator()<R>(begin + rest); });
}

// Output channels of a panel: [first, first + count).
struct Columns {
  int64_t first, count;
};

std::vector<Columns> columns_of_panels(at::IntArrayRef sizes) {
  std::vector<Columns> columns;
  int64_t begin = 0;
  for (const int64_t size : sizes) {
    for (int64_t at = 0; at < size; at += kPanel) columns.push_back({begin + at, std::min(kPanel, size - at)});
    begin += size;
  }
  return columns;
}

// Up to kChunk panels of one layer, and their output channels: [first, first + count).
struct Chunk {
  int64_t panel, panels, first, count;
};

std::vector<Chunk> chunks_of_panels(at::IntArrayRef sizes) {
  std::vector<Chunk> chunks;
  int64_t begin = 0, panel = 0;
  for (const int64_t size : sizes) {
    for (int64_t at = 0; at < size; at += kChunk * kPanel) {
      const int64_t count = std::min(kChunk * kPanel, size - at), panels = (count + kPanel - 1) / kPanel;
      chunks.push_back({panel, panels, begin + at, count});
      panel += panels;
    }
    begin += size;
  }
  return chunks;
}

// Transposes input channels [first, first + kPanel) of panels [count, in, kPanel] to [count * kPanel, kPanel], with
// zeros for channels >= `in`.
void turn_around(const float* panels, int64_t in, int64_t first, int64_t count, float* to) {
  for (int64_t panel = 0; panel < count; ++panel)
    for (int64_t k = 0; k < kPanel; k += kWidth)
      for (int64_t v = 0; v < kPanel; v += kWidth) {
        const float* from = panels + (panel * in + first + k) * kPanel + v;
        const int64_t lines = std::min(kWidth, in - first - k);
        Vec block[kWidth];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kWidth; ++i) {
          block[i] = i < lines ? load(from + i * kPanel) : Vec{};
          __builtin_prefetch(from + (in + i) * kPanel);  // the next panel's
        }
        transpose(block);
        for (int64_t i = 0; i < kWidth; ++i) store(to + (panel * kPanel + v + i) * kPanel + k, block[i]);
      }
}

// Packs weight [out, in] into panels.
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

}  // namespace

// sizes: output channels of each layer.
at::Tensor linear(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                  at::IntArrayRef sizes) {
  const at::Tensor dense = x.contiguous();
  const int64_t in = dense.size(-1), rows = dense.numel() / in, panels = packed.size(0);
  TORCH_CHECK(packed.size(1) == in, "a layer that reads ", packed.size(1), " numbers is given ", in);
  const std::vector<Columns> columns = columns_of_panels(sizes);
  TORCH_CHECK(static_cast<int64_t>(columns.size()) == panels, "layers of these sizes do not have ", panels, " panels");
  const int64_t out = columns.back().first + columns.back().count;
  auto shape = dense.sizes().vec();
  shape.back() = out;
  at::Tensor result = at::empty(shape, dense.options());
  const float *from = dense.const_data_ptr<float>(), *weights = packed.const_data_ptr<float>();
  const float* added = bias ? bias->const_data_ptr<float>() : nullptr;
  float* to = result.data_ptr<float>();
  // All panels for the first rows, then for the next ones, so that all threads read neighbouring weights.
  for_each((rows + kRows - 1) / kRows * panels, [&](int64_t task) {
    const int64_t panel = task % panels, begin = task / panels * kRows, end = std::min(rows, begin + kRows);
    const Columns mine = columns[panel];
    const float *weight = weights + panel * in * kPanel, *shift = added ? added + mine.first : nullptr;
    // The panel that this thread most likely takes next.
    const int64_t next = panel + at::get_num_threads();
    const float* ahead = next < panels ? weights + next * in * kPanel : nullptr;
    for_tiles(begin, end, [&]<int R>(int64_t row) {
      multiply_tile<R>(from + row * in, in, in, weight, shift, to + row * out + mine.first, out, mine.count,
                       row == begin ? weight + kAhead * kPanel : row == begin + kTile ? ahead : nullptr);
    });
  });
  return result;
}

// y [rows, out of all layers] -> y W [rows, in]. sizes: output channels of each layer.
at::Tensor linear_transposed(const at::Tensor& y, const at::Tensor& packed, at::IntArrayRef sizes) {
  const at::Tensor dense = y.contiguous();
  const int64_t out = dense.size(-1), rows = dense.numel() / out, in = packed.size(1);
  const std::vector<Chunk> chunks = chunks_of_panels(sizes);
  TORCH_CHECK(chunks.back().panel + chunks.back().panels == packed.size(0), "layers of these sizes do not have ",
              packed.size(0), " panels");
  TORCH_CHECK(chunks.back().first + chunks.back().count == out, "layers of these sizes do not have ", out, " channels");
  auto shape = dense.sizes().vec();
  shape.back() = in;
  at::Tensor result = at::zeros(shape, dense.options());
  const float *from = dense.const_data_ptr<float>(), *weights = packed.const_data_ptr<float>();
  float* to = result.data_ptr<float>();
  const int64_t blocks = (in + kPanel - 1) / kPanel;
  for_each((rows + kRows - 1) / kRows * blocks, [&](int64_t task) {
    const int64_t column = task % blocks * kPanel, count = std::min(kPanel, in - column);
    const int64_t begin = task / blocks * kRows, end = std::min(rows, begin + kRows);
    alignas(64) thread_local float turned[kChunk * kPanel * kPanel];
    for (const Chunk& chunk : chunks) {
      turn_around(weights + chunk.panel * in * kPanel, in, column, chunk.panels, turned);
      for_tiles(begin, end, [&]<int R>(int64_t row) {
        multiply_tile<R, true>(from + row * out + chunk.first, out, chunk.count, turned, nullptr,
                               to + row * in + column, in, count, nullptr);
      });
    }
  });
  return result;
}

TORCH_LIBRARY_FRAGMENT(reftserve, library) {
  library.def("pack_linear(Tensor weight) -> Tensor");
  library.def("linear(Tensor x, Tensor packed, Tensor? bias, int[] sizes) -> Tensor");
  library.def("linear_transposed(Tensor y, Tensor packed, int[] sizes) -> Tensor");
}
TORCH_LIBRARY_IMPL(reftserve, CPU, library) {
  library.impl("pack_linear", &pack_linear);
  library.impl("linear", &linear);
  library.impl("linear_transposed", &linear_transposed);
}

}  // namespace reftserve
