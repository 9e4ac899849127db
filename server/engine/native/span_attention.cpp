// Attention of training passes in float32: spans of several examples side by side, each after keys and values of its own
// that are kept and constant. Nothing is padded or copied together; the way back gives the gradients of what is new.
//
//   query [heads, rows, dim]   key, value [kv_heads, rows, dim]   out [rows, heads, dim]
//   before   of each span [2, kv_heads, start, dim], keys and values of the tokens before it
//   rows     of each span, how many tokens it has
//
// A task is a span and one key-value head; its keys and values, with what each product wants turned around, are small
// enough for the second-level cache. Up to kTokens of its tokens, times the query heads that share the head, are the
// *lines* of one product. The way back computes the weights again instead of keeping them.
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

// Room for a task's matrices, zero to begin with; a thread's tasks use the same memory one after another.
class Scratch {
 public:
  Matrix matrix(int64_t rows, int64_t columns) {
    thread_local std::deque<std::vector<float>> parts;
    if (parts.size() == used_) parts.emplace_back();
    const int64_t width = padded(columns);
    std::vector<float>& part = parts[used_++];
    part.assign(rows * width, 0.0f);
    return {rows, width, part.data()};
  }

 private:
  size_t used_ = 0;
};

// out (+)= a b, of the first lines of a and rows of b.
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
void product(const Matrix& a, int64_t lines, int64_t depth, const Matrix& b, const Matrix& out) {
  by_fours(lines, [&]<int L>(int64_t line) {
    int64_t column = 0;
    for (; column + 4 * kWidth <= out.width; column += 4 * kWidth)
      product_tile<L, 4, onto>(a, line, depth, b, column, out);
    for (; column < out.width; column += kWidth) product_tile<L, 1, onto>(a, line, depth, b, column, out);
  });
}

// to = from^T; both have whole blocks of sixteen in both directions.
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
  int64_t first, rows, start;  // first: of its rows in the pass
  at::Tensor before;           // contiguous
};

std::vector<Span> spans_of(at::TensorList before, at::IntArrayRef rows, int64_t tokens) {
  TORCH_CHECK(before.size() == rows.size(), rows.size(), " spans are given what lies before ", before.size());
  std::vector<Span> spans;
  int64_t first = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    spans.push_back({first, rows[i], before[i].size(2), before[i].contiguous()});
    first += rows[i];
  }
  TORCH_CHECK(first == tokens, "spans of ", first, " rows are given ", tokens);
  return spans;
}

// A span and one key-value head: what its lines meet, and what they make of it.
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

  // Keys (0) or values (1): those before, then the span's own.
  void gather(const Matrix& to, const Heads& own, int64_t which) const {
    const float* before =
        span.before.const_data_ptr<float>() + (which * span.before.size(1) + head) * span.start * dim;
    for (int64_t at = 0; at < keys; ++at) {
      const float* from = at < span.start ? before + at * dim : own.at(head, span.first + at - span.start);
      std::memcpy(to[at], from, dim * sizeof(float));
    }
  }

  // Q and the weights P of `count` tokens, from `token` of the span on. Returns how many lines that are.
  int64_t weigh(int64_t token, int64_t count) const {
    const int64_t lines = count * group;
    for (int64_t line = 0; line < lines; ++line) {
      const float* from = query.at(head * group + line % group, span.first + token + line / group);
      for (int64_t d = 0; d < dim; ++d) Q[line][d] = from[d] * scale;
    }
    product(Q, lines, dim, KT, P);
    for (int64_t line = 0; line < lines; ++line) {
      const int64_t end = span.start + token + line / group + 1;
      soften(P[line], window > 0 ? std::max<int64_t>(0, end - window) : 0, end);
    }
    return lines;
  }

  // softmax of scores in [from, end), zero elsewhere.
  void soften(float* scores, int64_t from, int64_t end) const {
    constexpr float kNothing = -std::numeric_limits<float>::infinity();
    std::fill(scores, scores + from, kNothing);
    std::fill(scores + end, scores + P.width, kNothing);
    Vec best = load(scores);
    for (int64_t key = kWidth; key < P.width; key += kWidth) {
      const Vec next = load(scores + key);
      best = next > best ? next : best;
    }
    const float largest = maximum(best);
    Vec added{};
    for (int64_t key = 0; key < P.width; key += kWidth) {
      const Vec weight = exp(load(scores + key) - largest);
      store(scores + key, weight);
      added += weight;
    }
    const float total = sum(added);
    for (int64_t key = 0; key < P.width; key += kWidth) store(scores + key, load(scores + key) / total);
  }

  const Span& span;
  const Heads& query;
  int64_t head, group, window, dim, keys, most;  // most: lines at once
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
  const std::vector<Span> spans = spans_of(before, rows, query.size(1));
  for_each(static_cast<int64_t>(spans.size()) * kv_heads, [&](int64_t i) {
    const int64_t head = i % kv_heads;
    Task task(spans[i / kv_heads], head, group, q, k, v, scale, window);
    const Span& span = task.span;
    const Matrix O = task.scratch.matrix(task.most, dim);
    for (int64_t token = 0; token < span.rows; token += kTokens) {
      const int64_t lines = task.weigh(token, std::min(kTokens, span.rows - token));
      product(task.P, lines, task.keys, task.V, O);
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
  const Heads q(query), k(key), v(value), g(gradient.transpose(0, 1));
  const int64_t heads = query.size(0), kv_heads = key.size(0), group = heads / kv_heads, dim = query.size(2);
  const int64_t tokens = query.size(1);
  // Rows outermost, as what they flow back to has them.
  at::Tensor of_query = at::empty({tokens, heads, dim}, query.options());
  at::Tensor of_key = at::empty({tokens, kv_heads, dim}, query.options());
  at::Tensor of_value = at::empty({tokens, kv_heads, dim}, query.options());
  float *to_query = of_query.data_ptr<float>(), *to_key = of_key.data_ptr<float>(), *to_value = of_value.data_ptr<float>();
  const std::vector<Span> spans = spans_of(before, rows, tokens);
  for_each(static_cast<int64_t>(spans.size()) * kv_heads, [&](int64_t i) {
    const int64_t head = i % kv_heads;
    Task task(spans[i / kv_heads], head, group, q, k, v, scale, window);
    const Span& span = task.span;
    Scratch& scratch = task.scratch;
    const Matrix VT = scratch.matrix(padded(dim), task.keys), G = scratch.matrix(task.most, dim);
    const Matrix dP = scratch.matrix(task.most, task.keys), dQ = scratch.matrix(task.most, dim);
    // Of the span's own keys: the weights that each has in the lines, and their gradients.
    const Matrix own = scratch.matrix(span.rows, task.most), d_own = scratch.matrix(span.rows, task.most);
    const Matrix dK = scratch.matrix(span.rows, dim), dV = scratch.matrix(span.rows, dim);
    turn(task.V, VT);
    for (int64_t token = 0; token < span.rows; token += kTokens) {
      const int64_t lines = task.weigh(token, std::min(kTokens, span.rows - token));
      for (int64_t line = 0; line < lines; ++line)
        std::memcpy(G[line], g.at(head * group + line % group, span.first + token + line / group), dim * sizeof(float));
      product(G, lines, dim, VT, dP);
      for (int64_t line = 0; line < lines; ++line) {
        // Of softmax's scores: P (dP - sum of P dP).
        float *weights = task.P[line], *slopes = dP[line];
        Vec sums{};
        for (int64_t at = 0; at < dP.width; at += kWidth) sums += load(weights + at) * load(slopes + at);
        const float mean = sum(sums);
        for (int64_t at = 0; at < dP.width; at += kWidth)
          store(slopes + at, load(weights + at) * (load(slopes + at) - mean));
        for (int64_t row = 0; row < span.rows; ++row) {
          own[row][line] = weights[span.start + row];
          d_own[row][line] = slopes[span.start + row];
        }
      }
      product(dP, lines, task.keys, task.K, dQ);
      for (int64_t line = 0; line < lines; ++line) {
        float* to = to_query + ((span.first + token + line / group) * heads + head * group + line % group) * dim;
        for (int64_t d = 0; d < dim; ++d) to[d] = dQ[line][d] * task.scale;
      }
      product<true>(d_own, span.rows, lines, task.Q, dK);
      product<true>(own, span.rows, lines, G, dV);
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
