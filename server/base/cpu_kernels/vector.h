// Vectors of sixteen floats by GCC's and Clang's vector extensions, which compile to AVX-512, AVX2 or NEON. Also exp,
// sums and maxima across a vector, and a dynamic split of work over torch's threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace reftserve {

constexpr int64_t kWidth = 16;
typedef float Vec __attribute__((vector_size(64), aligned(4)));
typedef int32_t IntVec __attribute__((vector_size(64), aligned(4)));
typedef int8_t ByteVec __attribute__((vector_size(16), aligned(1)));

inline Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<Vec*>(to) = value; }
inline Vec broadcast(float value) { return Vec{} + value; }

// Loads `count` of sixteen numbers at the end of a row; the rest are zero.
inline Vec load_part(const float* from, int64_t count) {
  if (count == kWidth) return load(from);
  Vec value{};
  std::memcpy(&value, from, count * sizeof(float));
  return value;
}
inline void store_part(float* to, Vec value, int64_t count) {
  if (count == kWidth) return store(to, value);
  std::memcpy(to, &value, count * sizeof(float));
}

// Interleaves eight lanes of a and b, starting at lane `first`.
template <int first>
inline Vec zip(Vec a, Vec b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, first, first + 16, first + 1, first + 17, first + 2, first + 18, first + 3,
                                 first + 19, first + 4, first + 20, first + 5, first + 21, first + 6, first + 22,
                                 first + 7, first + 23);
#else
  return __builtin_shuffle(a, b, IntVec{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23} + first);
#endif
}
// Transposes sixteen rows of sixteen: zipping the halves four times moves every number to its place.
inline void transpose(Vec (&rows)[kWidth]) {
#pragma GCC unroll 4
  for (int pass = 0; pass < 4; ++pass) {
    Vec zipped[kWidth];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kWidth / 2; ++i) {
      zipped[2 * i] = zip<0>(rows[i], rows[i + kWidth / 2]);
      zipped[2 * i + 1] = zip<8>(rows[i], rows[i + kWidth / 2]);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kWidth; ++i) rows[i] = zipped[i];
  }
}

// Calls task(at, count) for each sixteen of `size` numbers, and for the remainder.
template <class Task>
inline void for_each_vector(int64_t size, const Task& task) {
  int64_t at = 0;
  for (; at + kWidth <= size; at += kWidth) task(at, kWidth);
  if (at < size) task(at, size - at);
}

inline float sum(Vec value) {
  float total = 0.0f;
  for (int64_t i = 0; i < kWidth; ++i) total += value[i];
  return total;
}
inline float maximum(Vec value) {
  float best = value[0];
  for (int64_t i = 1; i < kWidth; ++i) best = value[i] > best ? value[i] : best;
  return best;
}
// Rounds to the nearest integer, ties to even, for |value| < 2^22.
inline Vec round_even(Vec value) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the fraction has no bits left
  return (value + kMagic) - kMagic;
}

// e^x to a relative 2e-7: Cody and Waite's reduction, then Cephes' polynomial. 0 below -87, clamped above 88; NaN stays.
inline Vec exp(Vec x) {
  const Vec bounded = x > 88.0f ? broadcast(88.0f) : x;
  const Vec n = round_even(bounded * 1.44269504088896341f);
  const Vec r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const IntVec exponent = (__builtin_convertvector(n, IntVec) + 127) << 23;
  Vec power;
  std::memcpy(&power, &exponent, sizeof(power));
  return x < -87.0f ? broadcast(0.0f) : p * power;
}

// Runs task(0) ... task(count - 1) on torch's threads, each taking the next one when it is free.
template <class Task>
void for_each(int64_t count, const Task& task) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  if (threads <= 1) {
    for (int64_t item = 0; item < count; ++item) task(item);
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t item = next++; item < count; item = next++) task(item);
  });
}

// Calls task<L>(line) for all lines: L = 4 at a time, then the remainder at once. One load serves L lines.
template <class Task>
void by_fours(int64_t lines, const Task& task) {
  int64_t line = 0;
  for (; line + 4 <= lines; line += 4) task.template operator()<4>(line);
  if (lines - line == 3) task.template operator()<3>(line);
  if (lines - line == 2) task.template operator()<2>(line);
  if (lines - line == 1) task.template operator()<1>(line);
}

// Runs task(row) for all rows of `size` numbers, on several threads if the work exceeds the cost of starting them.
template <class Task>
void for_rows(int64_t rows, int64_t size, const Task& task) {
  constexpr int64_t kWorthAThread = 8192;
  at::parallel_for(0, rows, std::max<int64_t>(1, kWorthAThread / size), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) task(row);
  });
}

}  // namespace reftserve
