// Queries over the cached entries of one sequence: decoding, and prompts piece by piece.
//
// Queries go by fours, whichever heads and tokens they are of. What comes of one does not depend on the others: sums run
// in the same order, and what a query does not see adds zeros at their end.
#pragma once
#include "simd.h"

#include <algorithm>

constexpr int QUERIES = 4;     // at a time
constexpr int64_t AHEAD = 4;  // tokens between what is read and what is fetched

// Part of the cached entries of one sequence: token s lies in block blocks[s >> shift], blocks hold 2^shift tokens.
template <typename T>
struct Pages {
  const T* base;
  const int32_t* blocks;
  int64_t shift, stride;  // elements from token to token
  int64_t ahead = 0;      // elements of each token to fetch before they are asked for

  T* at(int64_t s) const { return const_cast<T*>(base) + (((int64_t)blocks[s >> shift] << shift) + (s & ((1 << shift) - 1))) * stride; }

  // each(s, address, count) for tokens 0..last in order, as many as lie together.
  template <typename Each>
  void through(int64_t last, Each each) const {
    for (int64_t s = 0; s <= last; s += 1 << shift) each(s, at(s), std::min<int64_t>(last + 1 - s, 1 << shift));
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

// How pairs of numbers of a query in Q and of a key in T are read for multiply_add: as they lie where both are alike,
// widened where a query in float meets a cache in bf16.
template <typename Q, typename T>
struct Together {
  static constexpr int64_t WIDE = Format<T>::WIDE;
  static auto load_wide(const T* p) { return Format<T>::load_wide(p); }
};
template <>
struct Together<float, bf16> {
  static constexpr int64_t WIDE = LANES;
  static vf load_wide(const float* p) { return load(p); }
  static vf load_wide(const bf16* p) { return load(p); }
};
template <typename F, typename T>
auto load_last(const T* p, int64_t count) {
  T held[F::WIDE] = {};
  std::memcpy(held, p, count * sizeof(T));
  return F::load_wide(held);
}

// scores[j * QUERIES + h] of KEYS keys, `stride` apart, and the queries of width W at the addresses given.
template <int KEYS, typename Q, typename T>
void score_keys(const Q* const query[QUERIES], const T* key, int64_t stride, float* scores, int64_t W) {
  using F = Together<Q, T>;
  vf total[KEYS][QUERIES] = {};
  const auto add = [&](auto read) {
    decltype(read(query[0])) q[QUERIES];
    for (int h = 0; h < QUERIES; h++) q[h] = read(query[h]);
    for (int j = 0; j < KEYS; j++) {
      const auto k = read(key + j * stride);
      for (int h = 0; h < QUERIES; h++) total[j][h] = multiply_add(total[j][h], q[h], k);
    }
  };
  int64_t c = 0;
  for (; c + F::WIDE <= W; c += F::WIDE) add([&](const auto* p) { return F::load_wide(p + c); });
  if (c < W) add([&](const auto* p) { return load_last<F>(p + c, W - c); });
  for (int j = 0; j < KEYS; j++) sums(total[j], scores + j * QUERIES);
}
// All keys that are seen: one by one where they come from memory, which foresees a single stream, else by fours.
template <typename Q, typename T>
void score(const Q* const query[QUERIES], const Pages<T>& keys, float* scores, int64_t W, int64_t last, bool is_cached) {
  keys.through(last, [&](int64_t s, const T* key, int64_t count) {
    int64_t j = 0;
    if (is_cached)
      for (; j + 4 <= count; j += 4) score_keys<4>(query, key + j * keys.stride, keys.stride, scores + (s + j) * QUERIES, W);
    for (; j < count; j++) {
      const char* later = reinterpret_cast<const char*>(key + (j + AHEAD) * keys.stride);
      if (j + AHEAD < count)
        for (int64_t c = 0; c < keys.ahead * int64_t(sizeof(T)); c += 64) __builtin_prefetch(later + c);
      score_keys<1>(query, key + j * keys.stride, keys.stride, scores + (s + j) * QUERIES, W);
    }
  });
}

// Softmax along s of scores[s * QUERIES + h]; four tokens of four heads at a time.
inline void softmax(float* scores, int64_t last, float scale) {
  for (int64_t i = (last + 1) * QUERIES; i < round_up((last + 1) * QUERIES); i++) scores[i] = -INFINITY;
  vf top = splat(-INFINITY), total{};
  for (int64_t i = 0; i <= last * QUERIES; i += LANES) top = larger(load(scores + i), top);
  float best[LANES], mass[LANES];
  store(best, top);
  for (int h = 0; h < QUERIES; h++) best[h] = std::max(std::max(best[h], best[h + 4]), std::max(best[h + 8], best[h + 12]));
  for (int i = QUERIES; i < LANES; i++) best[i] = best[i % QUERIES];
  for (int64_t i = 0; i <= last * QUERIES; i += LANES) {
    const vf x = load(scores + i), p = exp_of((x - load(best)) * scale);
    store(scores + i, x == splat(-INFINITY) ? vf{} : p);
    total += load(scores + i);
  }
  store(mass, total);
  for (int h = 0; h < QUERIES; h++) mass[h] = 1 / ((mass[h] + mass[h + 4]) + (mass[h + 8] + mass[h + 12]));
  for (int i = QUERIES; i < LANES; i++) mass[i] = mass[i % QUERIES];
  for (int64_t i = 0; i <= last * QUERIES; i += LANES) store(scores + i, load(scores + i) * load(mass));
}

// out[h] = sum over s of probs[s * QUERIES + h] * values[s], `VECTORS` vectors from column c.
template <int VECTORS, typename Q, typename T>
void mix_columns(const float* probs, const Pages<T>& values, Q* const out[QUERIES], int64_t c, int64_t V, int64_t last) {
  vf total[QUERIES][VECTORS] = {};
  values.through(last, [&](int64_t s, const T* entry, int64_t count) {
    for (int64_t i = s; i < s + count; i++, entry += values.stride)
      for (int j = 0; j < VECTORS; j++) {
        const vf value = VECTORS > 1 ? load(entry + c + j * LANES) : load_some(entry + c, V - c);
        for (int h = 0; h < QUERIES; h++) total[h][j] += probs[i * QUERIES + h] * value;
      }
  });
  for (int h = 0; h < QUERIES; h++)
    for (int j = 0; j < VECTORS; j++) store_some(out[h] + c + j * LANES, total[h][j], V - c - j * LANES);
}
template <typename Q, typename T>
void mix(const float* probs, const Pages<T>& values, Q* const out[QUERIES], int64_t V, int64_t last) {
  int64_t c = 0;
  for (; c + 4 * LANES <= V; c += 4 * LANES) mix_columns<4>(probs, values, out, c, V, last);
  for (; c < V; c += LANES) mix_columns<1>(probs, values, out, c, V, last);
}

// Attention of `count` queries of one sequence. places(i): where query i, of width W, and its answer, of width V, lie,
// and the last token that it sees. scores: scratch of QUERIES * (longest + 4).
template <typename Q, typename T, typename Places>
void attend_to(const Q* query, Q* out, int64_t count, Places places, const Pages<T>& keys, const Pages<T>& values, float* scores, int64_t W,
               int64_t V, float scale) {
  for (int64_t i = 0; i < count; i += QUERIES) {
    const Q* from[QUERIES];
    Q* to[QUERIES];
    int64_t last[QUERIES], furthest = 0;
    for (int h = 0; h < QUERIES; h++) {  // the last one fills up the four
      const auto place = places(std::min<int64_t>(i + h, count - 1));
      from[h] = query + place.row * W;
      to[h] = out + place.row * V;
      last[h] = place.last;
      furthest = std::max(furthest, last[h]);
    }
    score(from, keys, scores, W, furthest, i > 0);
    for (int h = 0; h < QUERIES; h++)
      for (int64_t s = last[h] + 1; s <= furthest; s++) scores[s * QUERIES + h] = -INFINITY;
    softmax(scores, furthest, scale);
    mix(scores, values, to, V, furthest);
  }
}
struct Place {
  int64_t row, last;
};

// Consecutive tokens of one sequence, at most `limit`, from `start`; owner: (end,).
inline int64_t run_of(const int32_t* owner, int64_t start, int64_t end, int64_t limit) {
  int64_t n = start + 1;
  while (n < end && n - start < limit && owner[n] == owner[start]) n++;
  return n - start;
}
