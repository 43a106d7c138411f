// Queries of a few heads over the cached entries of one sequence: the core of decoding.
#pragma once
#include "simd.h"

#include <algorithm>

constexpr int HEADS = 4;  // at a time

// Part of the cached entries of one sequence: token s lies in block blocks[s >> shift], blocks hold 2^shift tokens.
template <typename T>
struct Pages {
  const T* base;
  const int32_t* blocks;
  int64_t shift, stride;  // elements from token to token

  T* at(int64_t s) const { return const_cast<T*>(base) + (((int64_t)blocks[s >> shift] << shift) + (s & ((1 << shift) - 1))) * stride; }

  // each(s, address) for tokens 0..last, in order.
  template <typename Each>
  void through(int64_t last, Each each) const {
    for (int64_t s = 0; s <= last;) {
      const T* entry = at(s);
      for (const int64_t end = std::min(last + 1, s + (1 << shift)); s < end; s++, entry += stride) each(s, entry);
    }
  }
};

// The sums of four vectors, side by side.
inline void sums(const vf x[4], float out[4]) {
  const vf a = __builtin_shufflevector(x[0], x[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
               __builtin_shufflevector(x[0], x[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  const vf b = __builtin_shufflevector(x[2], x[3], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
               __builtin_shufflevector(x[2], x[3], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  const vf c = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  typedef float v8 __attribute__((vector_size(32)));
  typedef float v4 __attribute__((vector_size(16), aligned(4), may_alias));
  const v8 d = __builtin_shufflevector(c, c, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(c, c, 8, 9, 10, 11, 12, 13, 14, 15);
  *reinterpret_cast<v4*>(out) = __builtin_shufflevector(d, d, 0, 1, 2, 3) + __builtin_shufflevector(d, d, 4, 5, 6, 7);
}

// scores[s * HEADS + h] for tokens 0..last of HEADS queries of width W at the addresses given.
template <typename T>
void score(const T* const query[HEADS], const Pages<T>& keys, float* scores, int64_t W, int64_t last) {
  const int64_t whole = W / LANES * LANES;
  keys.through(last, [&](int64_t s, const T* key) {
    vf total[HEADS] = {};
    for (int64_t c = 0; c < whole; c += LANES)
      for (int h = 0; h < HEADS; h++) total[h] += load(query[h] + c) * load(key + c);
    if (whole < W)
      for (int h = 0; h < HEADS; h++) total[h] += load_some(query[h] + whole, W - whole) * load_some(key + whole, W - whole);
    sums(total, scores + s * HEADS);
  });
}

// Softmax along s of scores[s * HEADS + h]; four tokens of four heads at a time.
inline void softmax(float* scores, int64_t last, float scale) {
  for (int64_t i = (last + 1) * HEADS; i < round_up((last + 1) * HEADS); i++) scores[i] = -INFINITY;
  vf top = splat(-INFINITY), total{};
  for (int64_t i = 0; i <= last * HEADS; i += LANES) top = larger(load(scores + i), top);
  float best[LANES], mass[LANES];
  store(best, top);
  for (int h = 0; h < HEADS; h++) best[h] = std::max(std::max(best[h], best[h + 4]), std::max(best[h + 8], best[h + 12]));
  for (int i = HEADS; i < LANES; i++) best[i] = best[i % HEADS];
  for (int64_t i = 0; i <= last * HEADS; i += LANES) {
    const vf x = load(scores + i), p = exp_of((x - load(best)) * scale);
    store(scores + i, x == splat(-INFINITY) ? vf{} : p);
    total += load(scores + i);
  }
  store(mass, total);
  for (int h = 0; h < HEADS; h++) mass[h] = 1 / ((mass[h] + mass[h + 4]) + (mass[h + 8] + mass[h + 12]));
  for (int i = HEADS; i < LANES; i++) mass[i] = mass[i % HEADS];
  for (int64_t i = 0; i <= last * HEADS; i += LANES) store(scores + i, load(scores + i) * load(mass));
}

// out[h] += sum over s of probs[s * HEADS + h] * values[s], `VECTORS` vectors from column c.
template <int VECTORS, typename T>
void mix_columns(const float* probs, const Pages<T>& values, T* const out[HEADS], int64_t count, int64_t c, int64_t V, int64_t last) {
  vf total[HEADS][VECTORS] = {};
  values.through(last, [&](int64_t s, const T* entry) {
    for (int j = 0; j < VECTORS; j++) {
      const vf value = load_some(entry + c + j * LANES, V - c - j * LANES);
      for (int h = 0; h < HEADS; h++) total[h][j] += probs[s * HEADS + h] * value;
    }
  });
  for (int64_t h = 0; h < count; h++)
    for (int j = 0; j < VECTORS; j++) store_some(out[h] + c + j * LANES, total[h][j], V - c - j * LANES);
}
template <typename T>
void mix(const float* probs, const Pages<T>& values, T* const out[HEADS], int64_t count, int64_t V, int64_t last) {
  int64_t c = 0;
  for (; c + 4 * LANES <= V; c += 4 * LANES) mix_columns<4>(probs, values, out, count, c, V, last);
  for (; c < V; c += LANES) mix_columns<1>(probs, values, out, count, c, V, last);
}

// Attention of `count` <= HEADS queries (count, W) to tokens 0..last: out (count, V). scores: scratch of HEADS * (last + 4).
template <typename T>
void attend_to(const T* query, const Pages<T>& keys, const Pages<T>& values, T* out, float* scores, int64_t count, int64_t W, int64_t V,
               int64_t last, float scale) {
  const T* from[HEADS];
  T* to[HEADS];
  for (int64_t h = 0; h < HEADS; h++) from[h] = query + std::min(h, count - 1) * W;
  for (int64_t h = 0; h < HEADS; h++) to[h] = out + std::min(h, count - 1) * V;
  score(from, keys, scores, W, last);
  softmax(scores, last, scale);
  mix(scores, values, to, count, V, last);
}
