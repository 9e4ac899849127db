// Attention of a training pass in float32: packed spans of several examples, each after its own cached, constant keys
// and values. Nothing is padded to the widest span. Only the spans' own queries, keys and values get gradients.
//
//   query [heads, rows, dim]   key, value [kv_heads, rows, dim]   out [rows, heads, dim]
//   before   for each span [2, kv_heads, start, dim]: cached keys and values of the tokens before it
//   rows     for each span: its number of tokens
//
// A task is one span and one key-value head. It gathers keys and values in its thread's scratch memory and transposes
// the keys; a thousand keys of 64 numbers fit the second-level cache. A product has a *line* for each of up to kTokens
// tokens and each query head that shares the key-value head. It covers the keys that the last of these tokens sees. The
// backward pass recomputes the attention weights instead of storing them.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <deque>
#include <vector>

#include "kernels.h"
#include "vector.h"

namespace reftserve {
namespace {

constexpr int64_t kTokens = 16;

int64_t padded(int64_t size) { return (size + kWidth - 1) / kWidth * kWidth; }

// Rows of floats, padded to whole vectors with zeros.
struct Matrix {
  int64_t rows, width;
  float* data;
  float* operator[](int64_t row) const { return data + row * width; }
};

// Zeroed memory for a task's matrices. The next task of the thread reuses small allocations.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    for (std::vector<float>& part : parts_)
      if (part.capacity() > kKept) std::vector<float>().swap(part);
  }

  Matrix matrix(int64_t rows, int64_t columns) {
    if (parts_.size() == used_) parts_.emplace_back();
    const int64_t width = padded(columns);
    std::vector<float>& part = parts_[used_++];
    part.assign(rows * width, 0.0f);
    return {rows, width, part.data()};
  }

 private:
  static constexpr size_t kKept = 1 << 18;  // numbers: 1 MB
  static thread_local std::deque<std::vector<float>> parts_;
  size_t used_ = 0;
};
thread_local std::deque<std::vector<float>> Scratch::parts_;

// out (+)= a b for L lines of a, the first `depth` rows of b and V vectors of columns.
template <int L, int V, bool onto>
void product_tile(const Matrix& a, int64_t line, int64_t depth, const Matrix& b, int64_t column, const Matrix& out) {
  Vec sums[L][V] = {};
  if constexpr (onto)
    for (int l = 0; l < L; ++l)
      for (int v = 0; v < V; ++v) sums[l][v] = load(out[line + l] + column + v * kWidth);
  for (int64_t d = 0; d < depth; ++d) {
    Vec row[V];
    for (int v = 0; v < V; ++v) row[v] = load(b[d] + column + v * kWidth);
    for (int l = 0; l < L; ++l)
      for (int v = 0; v < V; ++v) sums[l][v] += a[line + l][d] * row[v];
  }
  for (int l = 0; l < L; ++l)
    for (int v = 0; v < V; ++v) store(out[line + l] + column + v * kWidth, sums[l][v]);
}

template <bool onto = false>
void product(const Matrix& a, int64_t lines, int64_t depth, const Matrix& b, int64_t columns, const Matrix& out) {
  by_fours(lines, [&]<int L>(int64_t line) {
    int64_t column = 0;
    for (; column + 4 * kWidth <= columns; column += 4 * kWidth)
      product_tile<L, 4, onto>(a, line, depth, b, column, out);
    for (; column < columns; column += kWidth) product_tile<L, 1, onto>(a, line, depth, b, column, out);
  });
}

// to = from^T; both sizes are multiples of sixteen.
void turn(const Matrix& from, const Matrix& to) {
  for (int64_t row = 0; row < from.rows; row += kWidth)
    for (int64_t column = 0; column < from.width; column += kWidth) {
      Vec block[kWidth];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; ++i) block[i] = load(from[row + i] + column);
      transpose(block);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; ++i) store(to[column + i] + row, block[i]);
    }
}

// A tensor [heads, rows, dim] whose last dimension is dense.
struct Heads {
  explicit Heads(const at::Tensor& tensor)
      : held(tensor.stride(-1) == 1 ? tensor : tensor.contiguous()), data(held.const_data_ptr<float>()),
        head(held.stride(0)), row(held.stride(1)) {}
  const float* at(int64_t h, int64_t r) const { return data + h * head + r * row; }

  at::Tensor held;
  const float* data;
  int64_t head, row;
};

struct Span {
  int64_t first, rows, start;  // first: the span's first row in the pass
  at::Tensor before;           // contiguous
};

std::vector<Span> spans_of(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           at::TensorList before, at::IntArrayRef rows) {
  const int64_t tokens = query.size(1), dim = query.size(2), kv_heads = key.size(0);
  TORCH_CHECK(key.sizes() == value.sizes() && key.size(1) == tokens && key.size(2) == dim,
              "queries, keys and values must be of as many rows and numbers");
  TORCH_CHECK(query.size(0) % kv_heads == 0, kv_heads, " heads of keys cannot be shared by ", query.size(0));
  TORCH_CHECK(before.size() == rows.size(), rows.size(), " spans are given what lies before ", before.size());
  std::vector<Span> spans;
  int64_t first = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    TORCH_CHECK(before[i].dim() == 4 && before[i].sizes() == at::IntArrayRef({2, kv_heads, before[i].size(2), dim}),
                "what lies before a span must be [2, ", kv_heads, ", start, ", dim, "], and is ", before[i].sizes());
    spans.push_back({first, rows[i], before[i].size(2), before[i].contiguous()});
    first += rows[i];
  }
  TORCH_CHECK(first == tokens, "spans of ", first, " rows are given ", tokens);
  return spans;
}

// One span and key-value head: keys K, values V, queries Q and attention weights P.
struct Task {
  Task(const Span& span, int64_t head, int64_t group, const Heads& query, const Heads& key, const Heads& value,
       double scale, int64_t window)
      : span(span), query(query), head(head), group(group), window(window), dim(query.held.size(2)),
        keys(span.start + span.rows), most(std::min(kTokens, span.rows) * group), scale(static_cast<float>(scale)),
        K(scratch.matrix(padded(keys), dim)), V(scratch.matrix(padded(keys), dim)),
        KT(scratch.matrix(padded(dim), keys)), Q(scratch.matrix(most, dim)), P(scratch.matrix(most, keys)) {
    gather(K, key, 0);
    gather(V, value, 1);
    turn(K, KT);
  }

  // Copies keys (which = 0) or values (1): the cached ones, then the span's own.
  void gather(const Matrix& to, const Heads& own, int64_t which) const {
    const float* before =
        span.before.const_data_ptr<float>() + (which * span.before.size(1) + head) * span.start * dim;
    for (int64_t at = 0; at < keys; ++at) {
      const float* from = at < span.start ? before + at * dim : own.at(head, span.first + at - span.start);
      std::memcpy(to[at], from, dim * sizeof(float));
    }
  }

  // The number of keys that the last of tokens [token, token + count) of the span sees.
  int64_t seen(int64_t token, int64_t count) const { return span.start + token + count; }

  // Computes Q and the weights P of these tokens. Returns the number of lines.
  int64_t weigh(int64_t token, int64_t count) const {
    const int64_t lines = count * group, columns = padded(seen(token, count));
    for (int64_t line = 0; line < lines; ++line) {
      const float* from = query.at(head * group + line % group, span.first + token + line / group);
      for (int64_t d = 0; d < dim; ++d) Q[line][d] = from[d] * scale;
    }
    product(Q, lines, dim, KT, columns, P);
    for (int64_t line = 0; line < lines; ++line) {
      const int64_t end = span.start + token + line / group + 1;
      soften(P[line], columns, window > 0 ? std::max<int64_t>(0, end - window) : 0, end);
    }
    return lines;
  }

  // Softmax over scores [from, end); zero in the other columns.
  static void soften(float* scores, int64_t columns, int64_t from, int64_t end) {
    constexpr float kNothing = -std::numeric_limits<float>::infinity();
    std::fill(scores, scores + from, kNothing);
    std::fill(scores + end, scores + columns, kNothing);
    Vec best = load(scores);
    for (int64_t key = kWidth; key < columns; key += kWidth) {
      const Vec next = load(scores + key);
      best = next > best ? next : best;
    }
    const float largest = maximum(best);
    Vec added{};
    for (int64_t key = 0; key < columns; key += kWidth) {
      const Vec weight = exp(load(scores + key) - largest);
      store(scores + key, weight);
      added += weight;
    }
    const float total = sum(added);
    for (int64_t key = 0; key < columns; key += kWidth) store(scores + key, load(scores + key) / total);
  }

  const Span& span;
  const Heads& query;
  int64_t head, group, window, dim, keys, most;  // most: largest number of lines
  float scale;
  Scratch scratch;
  Matrix K, V, KT, Q, P;
};

}  // namespace

at::Tensor span_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                          at::TensorList before, at::IntArrayRef rows, double scale, int64_t window) {
  const Heads q(query), k(key), v(value);
  const int64_t heads = query.size(0), kv_heads = key.size(0), group = heads / kv_heads, dim = query.size(2);
  at::Tensor out = at::empty({query.size(1), heads, dim}, query.options());
  float* to = out.data_ptr<float>();
  const std::vector<Span> spans = spans_of(query, key, value, before, rows);
  for_each(static_cast<int64_t>(spans.size()) * kv_heads, [&](int64_t i) {
    const int64_t head = i % kv_heads;
    Task task(spans[i / kv_heads], head, group, q, k, v, scale, window);
    const Span& span = task.span;
    const Matrix O = task.scratch.matrix(task.most, dim);
    for (int64_t token = 0; token < span.rows; token += kTokens) {
      const int64_t count = std::min(kTokens, span.rows - token), lines = task.weigh(token, count);
      product(task.P, lines, task.seen(token, count), task.V, O.width, O);
      for (int64_t line = 0; line < lines; ++line)
        std::memcpy(to + ((span.first + token + line / group) * heads + head * group + line % group) * dim, O[line],
                    dim * sizeof(float));
    }
  });
  return out;
}

// gradient [rows, heads, dim] -> gradients of query, key and value.
std::tuple<at::Tensor, at::Tensor, at::Tensor> span_attention_backward(
    const at::Tensor& gradient, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    at::TensorList before, at::IntArrayRef rows, double scale, int64_t window) {
  TORCH_CHECK(gradient.sizes() == at::IntArrayRef({query.size(1), query.size(0), query.size(2)}),
              "the gradient of attention must be [rows, heads, dim]");
  const Heads q(query), k(key), v(value), g(gradient.transpose(0, 1));
  const int64_t heads = query.size(0), kv_heads = key.size(0), group = heads / kv_heads, dim = query.size(2);
  const int64_t tokens = query.size(1);
  // Rows are the outermost dimension, as in the projections' outputs.
  at::Tensor of_query = at::empty({tokens, heads, dim}, query.options());
  at::Tensor of_key = at::empty({tokens, kv_heads, dim}, query.options());
  at::Tensor of_value = at::empty({tokens, kv_heads, dim}, query.options());
  float *to_query = of_query.data_ptr<float>(), *to_key = of_key.data_ptr<float>(), *to_value = of_value.data_ptr<float>();
  const std::vector<Span> spans = spans_of(query, key, value, before, rows);
  for_each(static_cast<int64_t>(spans.size()) * kv_heads, [&](int64_t i) {
    const int64_t head = i % kv_heads;
    Task task(spans[i / kv_heads], head, group, q, k, v, scale, window);
    const Span& span = task.span;
    Scratch& scratch = task.scratch;
    const Matrix VT = scratch.matrix(padded(dim), task.keys), G = scratch.matrix(task.most, dim);
    const Matrix dP = scratch.matrix(task.most, task.keys), dQ = scratch.matrix(task.most, dim);
    // For each of the span's own keys: its weights in all lines, and their gradients.
    const Matrix own = scratch.matrix(span.rows, task.most), d_own = scratch.matrix(span.rows, task.most);
    const Matrix dK = scratch.matrix(span.rows, dim), dV = scratch.matrix(span.rows, dim);
    turn(task.V, VT);
    for (int64_t token = 0; token < span.rows; token += kTokens) {
      const int64_t count = std::min(kTokens, span.rows - token), lines = task.weigh(token, count);
      const int64_t seen = task.seen(token, count), columns = padded(seen), own_keys = token + count;
      for (int64_t line = 0; line < lines; ++line)
        std::memcpy(G[line], g.at(head * group + line % group, span.first + token + line / group), dim * sizeof(float));
      product(G, lines, dim, VT, columns, dP);
      for (int64_t line = 0; line < lines; ++line) {
        // The gradient of the scores: P (dP - sum of P dP).
        float *weights = task.P[line], *slopes = dP[line];
        Vec sums{};
        for (int64_t at = 0; at < columns; at += kWidth) sums += load(weights + at) * load(slopes + at);
        const float mean = sum(sums);
        for (int64_t at = 0; at < columns; at += kWidth)
          store(slopes + at, load(weights + at) * (load(slopes + at) - mean));
        for (int64_t row = 0; row < own_keys; ++row) {
          own[row][line] = weights[span.start + row];
          d_own[row][line] = slopes[span.start + row];
        }
      }
      product(dP, lines, seen, task.K, dQ.width, dQ);
      for (int64_t line = 0; line < lines; ++line) {
        float* to = to_query + ((span.first + token + line / group) * heads + head * group + line % group) * dim;
        for (int64_t d = 0; d < dim; ++d) to[d] = dQ[line][d] * task.scale;
      }
      product<true>(d_own, own_keys, lines, task.Q, dK.width, dK);
      product<true>(own, own_keys, lines, G, dV.width, dV);
    }
    for (int64_t row = 0; row < span.rows; ++row) {
      const int64_t at = ((span.first + row) * kv_heads + head) * dim;
      std::memcpy(to_key + at, dK[row], dim * sizeof(float));
      std::memcpy(to_value + at, dV[row], dim * sizeof(float));
    }
  });
  return {of_query.transpose(0, 1), of_key.transpose(0, 1), of_value.transpose(0, 1)};
}

TORCH_LIBRARY_FRAGMENT(reftserve, library) {
  library.def(
      "span_attention(Tensor query, Tensor key, Tensor value, Tensor[] before, int[] rows, float scale, int window) "
      "-> Tensor");
}
TORCH_LIBRARY_IMPL(reftserve, CPU, library) { library.impl("span_attention", &span_attention); }

}  // namespace reftserve
