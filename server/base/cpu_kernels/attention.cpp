// Attention of a packed step over the paged cache, in float32: prompts and decodes alike, nothing gathered.
//
//   query [heads, tokens, dim]   key, value [kv_heads, tokens, dim]   out [tokens, heads, value_dim]
//   key_cache   [blocks, kv_heads, dim, block_size]    transposed: one instruction multiplies a query with sixteen keys
//   value_cache [blocks, kv_heads, block_size, value_dim]
//   tables [sequences, n]; rows [sequences + 1]: a sequence's tokens in the packed step; starts [sequences]: position of
//   its first one
//
// The allocator of the cache pads the sizes of blocks and of values to whole vectors. A task has a *line* for each of
// up to kRows tokens of a sequence and each query head that shares the key-value head. Softmax is online over the
// sequence's blocks (Milakov and Gimelshein 2018), so a line's result depends only on its own sequence, to the bit.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "vector.h"

namespace reftserve {
namespace {

constexpr int64_t kRows = 16;

// scores[line][key] = query[line] . keys[:, key], for L lines and V vectors of keys.
template <int L, int V>
void score_tile(const float* query, int64_t dim, const float* keys, int64_t width, float* scores) {
  Vec sums[L][V] = {};
  for (int64_t d = 0; d < dim; ++d) {
    Vec key[V];
    for (int v = 0; v < V; ++v) key[v] = load(keys + d * width + v * kWidth);
    for (int l = 0; l < L; ++l)
      for (int v = 0; v < V; ++v) sums[l][v] += query[l * dim + d] * key[v];
  }
  for (int l = 0; l < L; ++l)
    for (int v = 0; v < V; ++v) store(scores + l * width + v * kWidth, sums[l][v]);
}

// out[line] = out[line] * decay[line] + weights[line] . values, for L lines and V vectors of value_dim.
template <int L, int V>
void weigh_tile(const float* weights, int64_t width, int64_t keys, const float* values, int64_t value_dim,
                const float* decay, float* out) {
  Vec sums[L][V];
  for (int l = 0; l < L; ++l)
    for (int v = 0; v < V; ++v) sums[l][v] = load(out + l * value_dim + v * kWidth) * decay[l];
  for (int64_t k = 0; k < keys; ++k) {
    Vec value[V];
    for (int v = 0; v < V; ++v) value[v] = load(values + k * value_dim + v * kWidth);
    for (int l = 0; l < L; ++l)
      for (int v = 0; v < V; ++v) sums[l][v] += weights[l * width + k] * value[v];
  }
  for (int l = 0; l < L; ++l)
    for (int v = 0; v < V; ++v) store(out + l * value_dim + v * kWidth, sums[l][v]);
}

template <int L>
void score_lines(const float* query, int64_t dim, const float* keys, int64_t width, float* scores) {
  int64_t at = 0;
  for (; at + 2 * kWidth <= width; at += 2 * kWidth) score_tile<L, 2>(query, dim, keys + at, width, scores + at);
  if (at < width) score_tile<L, 1>(query, dim, keys + at, width, scores + at);
}

template <int L>
void weigh_lines(const float* weights, int64_t width, int64_t keys, const float* values, int64_t value_dim,
                 const float* decay, float* out) {
  int64_t at = 0;
  for (; at + 4 * kWidth <= value_dim; at += 4 * kWidth)
    weigh_tile<L, 4>(weights, width, keys, values + at, value_dim, decay, out + at);
  for (; at < value_dim; at += kWidth) weigh_tile<L, 1>(weights, width, keys, values + at, value_dim, decay, out + at);
}

struct Step {
  const float *query, *key, *value;
  int64_t query_head, query_token, key_head, key_token, value_head, value_token;  // strides, in floats
  float *key_cache, *value_cache, *out;
  const int64_t *tables, *rows, *starts;
  int64_t table_width, heads, kv_heads, dim, value_dim, block_size, padded_size, padded_value, window;
  float scale;

  int64_t tokens_of(int64_t sequence) const { return rows[sequence + 1] - rows[sequence]; }
  float* keys_of(int64_t block, int64_t head) const {
    return key_cache + (block * kv_heads + head) * dim * padded_size;
  }
  float* values_of(int64_t block, int64_t head) const {
    return value_cache + (block * kv_heads + head) * padded_size * padded_value;
  }

  // Stores the new keys and values of one sequence's head.
  void write(int64_t sequence, int64_t head) const {
    for (int64_t row = rows[sequence]; row < rows[sequence + 1]; ++row) {
      const int64_t position = starts[sequence] + row - rows[sequence];
      const int64_t block = tables[sequence * table_width + position / block_size];
      const int64_t offset = position % block_size;
      const float* from = key + head * key_head + row * key_token;
      float* to = keys_of(block, head) + offset;
      for (int64_t d = 0; d < dim; ++d) to[d * padded_size] = from[d];
      std::memcpy(values_of(block, head) + offset * padded_value, value + head * value_head + row * value_token,
                  value_dim * sizeof(float));
    }
  }

  // Attention of up to kRows tokens of one sequence, and of the query heads that share `head`.
  void attend(int64_t sequence, int64_t head, int64_t first, int64_t count) const {
    const int64_t group = heads / kv_heads, lines = count * group;
    thread_local std::vector<float> scratch;
    scratch.assign(lines * (dim + padded_size + padded_value + 3), 0.0f);
    float* queries = scratch.data();
    float* scores = queries + lines * dim;
    float* sums = scores + lines * padded_size;
    float* largest = sums + lines * padded_value;
    float* total = largest + lines;
    float* decay = total + lines;
    for (int64_t line = 0; line < lines; ++line) {
      const float* from = query + (head * group + line % group) * query_head + (first + line / group) * query_token;
      for (int64_t d = 0; d < dim; ++d) queries[line * dim + d] = from[d] * scale;
      largest[line] = -std::numeric_limits<float>::infinity();
    }
    // Tokens at positions [begin, begin + count) look back to position `oldest` at most.
    const int64_t begin = starts[sequence] + first - rows[sequence], end = begin + count;
    const int64_t oldest = window > 0 ? std::max<int64_t>(0, begin - window + 1) : 0;
    for (int64_t at = oldest / block_size * block_size; at < end; at += block_size) {
      const int64_t block = tables[sequence * table_width + at / block_size];
      const int64_t keys = std::min(block_size, end - at);
      const float* block_keys = keys_of(block, head);
      const float* block_values = values_of(block, head);
      // Prefetch the values while the scores are computed; memory would be idle otherwise.
      for (int64_t f = 0; f < keys * padded_value; f += kWidth) __builtin_prefetch(block_values + f);
      by_fours(lines, [&]<int L>(int64_t line) {
        score_lines<L>(queries + line * dim, dim, block_keys, padded_size, scores + line * padded_size);
      });
      for (int64_t line = 0; line < lines; ++line) {
        const int64_t position = begin + line / group;
        const int64_t from = window > 0 ? std::max<int64_t>(0, position - window + 1 - at) : 0;
        soften(scores + line * padded_size, from, std::min(keys, position + 1 - at), largest[line], total[line], decay[line]);
      }
      const auto weigh = [&](int64_t from, int64_t lines, int64_t keys) {
        by_fours(lines, [&]<int L>(int64_t line) {
          weigh_lines<L>(scores + (from + line) * padded_size, padded_size, keys, block_values, padded_value,
                         decay + from + line, sums + (from + line) * padded_value);
        });
      };
      if (at + keys <= begin + 1) {
        weigh(0, lines, keys);
      } else {
        // Skip later tokens' values even at weight zero: an edit there may have overflowed, and other requests
        // without that edit may share this token's block.
        for (int64_t token = 0; token < count; ++token)
          weigh(token * group, group, std::clamp<int64_t>(begin + token + 1 - at, 0, keys));
      }
    }
    for (int64_t line = 0; line < lines; ++line) {
      float* to = out + ((first + line / group) * heads + head * group + line % group) * value_dim;
      for (int64_t d = 0; d < value_dim; ++d) to[d] = sums[line * padded_value + d] / total[line];
    }
  }

  // Turns the scores of one line's block into weights: e^(score - largest) in [from, to), 0 elsewhere. Sums over
  // earlier blocks must be multiplied by `decay`.
  void soften(float* scores, int64_t from, int64_t to, float& largest, float& total, float& decay) const {
    constexpr float kNothing = -std::numeric_limits<float>::infinity();
    for (int64_t key = 0; key < std::min(from, padded_size); ++key) scores[key] = kNothing;
    for (int64_t key = std::max<int64_t>(to, 0); key < padded_size; ++key) scores[key] = kNothing;
    Vec best = load(scores);
    for (int64_t key = kWidth; key < padded_size; key += kWidth) {
      const Vec next = load(scores + key);
      best = next > best ? next : best;
    }
    const float before = largest;
    largest = std::max(before, maximum(best));
    if (largest == kNothing) {  // the window has not begun yet
      std::fill(scores, scores + padded_size, 0.0f);
      decay = 1.0f;
      return;
    }
    decay = std::exp(before - largest);
    Vec added{};
    for (int64_t key = 0; key < padded_size; key += kWidth) {
      const Vec weight = exp(load(scores + key) - largest);
      store(scores + key, weight);
      added += weight;
    }
    total = total * decay + sum(added);
  }
};

at::Tensor paged_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           at::Tensor& key_cache, at::Tensor& value_cache, const at::Tensor& tables,
                           const at::Tensor& rows, const at::Tensor& starts, int64_t block_size, double scale,
                           int64_t window) {
  TORCH_CHECK(query.scalar_type() == at::kFloat && key_cache.scalar_type() == at::kFloat, "float32 only");
  const auto dense = [](const at::Tensor& t) { return t.stride(-1) == 1 ? t : t.contiguous(); };
  const at::Tensor q = dense(query), k = dense(key), v = dense(value);
  at::Tensor out = at::empty({q.size(1), q.size(0), v.size(2)}, q.options());
  const Step step{q.const_data_ptr<float>(), k.const_data_ptr<float>(), v.const_data_ptr<float>(),
                  q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
                  key_cache.data_ptr<float>(), value_cache.data_ptr<float>(), out.data_ptr<float>(),
                  tables.const_data_ptr<int64_t>(), rows.const_data_ptr<int64_t>(), starts.const_data_ptr<int64_t>(),
                  tables.size(1), q.size(0), k.size(0), q.size(2), v.size(2), block_size, key_cache.size(3),
                  value_cache.size(3), window, static_cast<float>(scale)};
  const int64_t sequences = starts.size(0);
  struct Task {
    int64_t sequence, first, count;
  };
  std::vector<Task> tasks;
  // A sequence with one task, such as a decoding one, stores its keys and values in that task; others store them first.
  std::vector<int64_t> longer;
  for (int64_t sequence = 0; sequence < sequences; ++sequence) {
    if (step.tokens_of(sequence) > kRows) longer.push_back(sequence);
    for (int64_t first = step.rows[sequence]; first < step.rows[sequence + 1]; first += kRows)
      tasks.push_back({sequence, first, std::min(kRows, step.rows[sequence + 1] - first)});
  }
  // Later tokens attend to more keys, so these longer tasks go first.
  std::reverse(tasks.begin(), tasks.end());
  for_each(static_cast<int64_t>(longer.size()) * step.kv_heads,
           [&](int64_t i) { step.write(longer[i / step.kv_heads], i % step.kv_heads); });
  for_each(static_cast<int64_t>(tasks.size()) * step.kv_heads, [&](int64_t i) {
    const Task& task = tasks[i / step.kv_heads];
    if (step.tokens_of(task.sequence) <= kRows) step.write(task.sequence, i % step.kv_heads);
    step.attend(task.sequence, i % step.kv_heads, task.first, task.count);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(reftserve, library) {
  library.def(
      "paged_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor tables, Tensor rows, Tensor starts, int block_size, float scale, int window) -> Tensor");
}
TORCH_LIBRARY_IMPL(reftserve, CPU, library) { library.impl("paged_attention", &paged_attention); }

}  // namespace reftserve
