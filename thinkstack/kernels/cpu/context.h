// Attention of queries over the cached entries of one sequence, for decoding and chunked prefill.
//
// Four queries, of any heads and tokens, are computed together. The result of one does not depend on the others: sums have
// the same order, and keys beyond a query's last one add zeros at their end.
#pragma once
#include "matmul.h"

#include <algorithm>
#include <functional>

constexpr int QUERIES = 4;          // at a time
constexpr int64_t PREFETCH_BYTES = 6 << 10;  // bytes from the current address to the prefetched one
constexpr int64_t SEGMENT = 1024;   // tokens computed at a time; the results of segments are combined in order

// Part of the cached entries of one sequence: token s lies in block blocks[s >> shift], blocks hold 2^shift tokens.
template <typename T>
struct Pages {
  const T* base;
  const int32_t* blocks;
  int64_t shift, stride;  // elements from token to token
  int64_t ahead = 0;      // elements of each token to prefetch

  T* at(int64_t s) const { return const_cast<T*>(base) + (((int64_t)blocks[s >> shift] << shift) + (s & ((1 << shift) - 1))) * stride; }

  // each(s, address, count) for tokens [first, end) in order, block by block; `first` is the start of a block.
  template <typename Each>
  void for_each_block(int64_t first, int64_t end, Each each) const {
    for (int64_t s = first; s < end; s += 1 << shift) each(s, at(s), std::min<int64_t>(end - s, 1 << shift));
  }
};

// Groups [from, to) of heads over the entries of one sequence: the keys and values of consecutive groups are key_g and
// value_g elements apart.
template <typename T>
struct Groups {
  Pages<T> keys, values;  // of group 0
  int64_t from, to, key_g, value_g;
  bool prefetches = false;         // whether to prefetch entries
  const T* next_block = nullptr;  // the block that is read next
};

// State of an online softmax of several queries: the largest score, the sum of e^(score - top), the weighted values.
struct OnlineSoftmax {
  float *top, *mass, *out;  // (rows,), (rows,), (rows, V)

  static int64_t floats(int64_t rows, int64_t V) { return rows * (V + 2); }
  OnlineSoftmax(float* buffer, int64_t rows) : top(buffer), mass(buffer + rows), out(buffer + 2 * rows) {}
  OnlineSoftmax from(int64_t row, int64_t V) const {
    OnlineSoftmax own = *this;
    own.top += row, own.mass += row, own.out += row * V;
    return own;
  }

  void clear(int64_t rows, int64_t V) {
    std::fill(top, top + rows, -INFINITY);
    std::fill(mass, mass + rows, 0.0f);
    std::fill(out, out + rows * V, 0.0f);
  }
  // Rescale row n to the new largest score `most`.
  void raise(int64_t n, float most, int64_t V) {
    if (most == top[n]) return;
    const float less = exp_of(splat(top[n] - most))[0];
    top[n] = most, mass[n] *= less;
    for (int64_t c = 0; c < V; c += LANES) store_some(out + n * V + c, load_some(out + n * V + c, V - c) * less, V - c);
  }
  // Add row m of `other`, computed over other tokens; `other` is rescaled.
  void add(int64_t n, OnlineSoftmax other, int64_t m, int64_t V) {
    const float most = std::max(top[n], other.top[m]);
    raise(n, most, V);
    other.raise(m, most, V);
    mass[n] += other.mass[m];
    for (int64_t c = 0; c < V; c += LANES)
      store_some(out + n * V + c, load_some(out + n * V + c, V - c) + load_some(other.out + m * V + c, V - c), V - c);
  }
  template <typename Q>
  void write(int64_t n, Q* row, int64_t V) const {
    for (int64_t c = 0; c < V; c += LANES) store_some(row + c, load_some(out + n * V + c, V - c) / mass[n], V - c);
  }
};

// One step of summing within groups of four lanes: adds the lanes of a, and of b, that are BY apart.
template <int BY, bool FIRST>
struct Folded {
  static constexpr int at(int i) { return (i & BY ? int(LANES) + i - BY : i) + (FIRST ? 0 : BY); }
};
template <int BY>
inline vf fold(vf a, vf b) {
  return shuffle<Folded<BY, true>>(a, b) + shuffle<Folded<BY, false>>(a, b);
}
inline v4 in_four(v4 x) { return x; }
#ifdef __AVX2__
inline v4 in_four(v8 x) { return low(x) + high(x); }
#endif
#ifdef __AVX512F__
inline v4 in_four(vf x) { return in_four(low(x) + high(x)); }
#endif
// The sums of four vectors.
inline void sums(const vf x[4], float out[4]) {
  const v4 found = in_four(fold<2>(fold<1>(x[0], x[1]), fold<1>(x[2], x[3])));
  std::memcpy(out, &found, sizeof(found));
}

// Loads of a query in Q and a key in T for multiply_add: unchanged if the types are equal, as float for a query in float
// and a cache in bf16.
template <typename Q, typename T>
struct OperandPair {
  static constexpr int64_t WIDE = Format<T>::WIDE;
  static auto load_wide(const T* p) { return Format<T>::load_wide(p); }
};
template <>
struct OperandPair<float, bf16> {
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

// scores[j * QUERIES + h] of COUNT keys, `stride` apart, with four queries of width W.
template <int COUNT, typename Q, typename T>
void score_keys(const Q* const query[QUERIES], const T* key, int64_t stride, float* scores, int64_t W) {
  using F = OperandPair<Q, T>;
  vf total[COUNT][QUERIES] = {};
  const auto add = [&](auto read) {
    decltype(read(query[0])) q[QUERIES];
    UNROLLED for (int h = 0; h < QUERIES; h++) q[h] = read(query[h]);
    UNROLLED for (int j = 0; j < COUNT; j++) {
      const auto k = read(key + j * stride);
      UNROLLED for (int h = 0; h < QUERIES; h++) total[j][h] = multiply_add(total[j][h], q[h], k);
    }
  };
  int64_t c = 0;
  for (; c + F::WIDE <= W; c += F::WIDE) add([&](const auto* p) { return F::load_wide(p + c); });
  if (c < W) add([&](const auto* p) { return load_last<F>(p + c, W - c); });
  UNROLLED for (int j = 0; j < COUNT; j++) sums(total[j], scores + j * QUERIES);
}
constexpr int KEYS_PER_TILE = REGISTERS / 8, VALUE_VECTORS = REGISTERS / 8;  // keys, and vectors of a value, computed at a time
// Scores of keys [first, end): one key at a time from memory, because the hardware prefetches a single stream, else several.
template <typename Q, typename T>
void score_tokens(const Q* const query[QUERIES], const Pages<T>& keys, float* scores, int64_t W, int64_t first, int64_t end, bool is_cached) {
  keys.for_each_block(first, end, [&](int64_t s, const T* key, int64_t count) {
    float* own = scores + (s - first) * QUERIES;
    const T* next = s + count < end ? keys.at(s + count) : key;
    const int64_t ahead = (PREFETCH_BYTES / int64_t(sizeof(T)) + keys.stride - 1) / keys.stride;
    int64_t j = 0;
    if (is_cached)
      for (; j + KEYS_PER_TILE <= count; j += KEYS_PER_TILE) score_keys<KEYS_PER_TILE>(query, key + j * keys.stride, keys.stride, own + j * QUERIES, W);
    for (; j < count; j++) {
      const T* later = j + ahead < count ? key + (j + ahead) * keys.stride : next + (j + ahead - count) * keys.stride;
      for (int64_t c = 0; c < keys.ahead; c += 64 / int64_t(sizeof(T))) __builtin_prefetch(later + c);
      score_keys<1>(query, key + j * keys.stride, keys.stride, own + j * QUERIES, W);
    }
  });
}

// Every QUERIES-th of N * QUERIES numbers, reduced pairwise.
template <int N, typename Combine>
inline float combined(const float* x, Combine combine) {
  if constexpr (N == 1) return x[0];
  else return combine(combined<N / 2>(x, combine), combined<N / 2>(x + N / 2 * QUERIES, combine));
}

// Replaces scores[s * QUERIES + h] of `count` tokens by e^(score - top); returns each query's top and sum. The top of a query
// without keys is -inf.
inline void softmax_weights(float* scores, int64_t count, float scale, float top[QUERIES], float mass[QUERIES]) {
  for (int64_t i = count * QUERIES; i < round_up(count * QUERIES); i++) scores[i] = -INFINITY;
  vf largest = splat(-INFINITY), total{};
  for (int64_t i = 0; i < count * QUERIES; i += LANES) largest = larger(load(scores + i), largest);
  float best[LANES], part[LANES];
  store(best, largest);
  constexpr int TOKENS = LANES / QUERIES;
  for (int h = 0; h < QUERIES; h++) top[h] = combined<TOKENS>(best + h, [](float a, float b) { return std::max(a, b); });
  for (int i = 0; i < LANES; i++) best[i] = top[i % QUERIES];
  for (int64_t i = 0; i < count * QUERIES; i += LANES) {
    const vf x = load(scores + i), p = exp_of((x - load(best)) * scale);
    store(scores + i, x == splat(-INFINITY) ? vf{} : p);
    total += load(scores + i);
  }
  store(part, total);
  for (int h = 0; h < QUERIES; h++) top[h] *= scale, mass[h] = combined<TOKENS>(part + h, std::plus<float>());
}

// out[h] = sum over tokens [first, end) of weights[(s - first) * QUERIES + h] * values[s], `VECTORS` vectors from column c.
template <int VECTORS, typename T>
void weighted_sum_columns(const float* weights, const Pages<T>& values, float* const out[QUERIES], int64_t c, int64_t V, int64_t first, int64_t end) {
  vf total[QUERIES][VECTORS] = {};
  values.for_each_block(first, end, [&](int64_t s, const T* entry, int64_t count) {
    const float* own = weights + (s - first) * QUERIES;
    for (int64_t i = 0; i < count; i++, entry += values.stride, own += QUERIES)
      UNROLLED for (int j = 0; j < VECTORS; j++) {
        const vf value = VECTORS > 1 ? load(entry + c + j * LANES) : load_some(entry + c, V - c);
        UNROLLED for (int h = 0; h < QUERIES; h++) total[h][j] += own[h] * value;
      }
  });
  UNROLLED for (int h = 0; h < QUERIES; h++)
    UNROLLED for (int j = 0; j < VECTORS; j++) {
      if constexpr (VECTORS > 1) store(out[h] + c + j * LANES, total[h][j]);
      else store_some(out[h] + c, total[h][j], V - c);
    }
}
template <typename T>
void weighted_sum(const float* weights, const Pages<T>& values, float* const out[QUERIES], int64_t V, int64_t first, int64_t end) {
  int64_t c = 0;
  for (; c + VALUE_VECTORS * LANES <= V; c += VALUE_VECTORS * LANES) weighted_sum_columns<VALUE_VECTORS>(weights, values, out, c, V, first, end);
  for (; c < V; c += LANES) weighted_sum_columns<1>(weights, values, out, c, V, first, end);
}

struct Place {
  int64_t row, last;
};

// Consecutive tokens of one sequence, at most `limit`, from `start`; seq_index: (end,).
inline int64_t sequence_run(const int32_t* seq_index, int64_t start, int64_t end, int64_t limit) {
  int64_t n = start + 1;
  while (n < end && n - start < limit && seq_index[n] == seq_index[start]) n++;
  return n - start;
}

// Scratch of one thread. W: width of queries and keys, V: of values; Q, T: types of queries and of the cache.
template <typename Q, typename T>
class FourQueryAttention {
 public:
  FourQueryAttention(int64_t W, int64_t V)
      : W_(W), V_(V), scratch_(4 * (QUERIES * SEGMENT + OnlineSoftmax::floats(ROWS, V) + OnlineSoftmax::floats(QUERIES, V)) + 3 * Scratch::SLACK),
        scores_(scratch_.take<float>(QUERIES * SEGMENT)), total_(scratch_.take<float>(OnlineSoftmax::floats(ROWS, V)), ROWS),
        segment_(scratch_.take<float>(OnlineSoftmax::floats(QUERIES, V)), QUERIES) {}

  // places(g, i): the row of query i of group g in `query` and `out`, and its last token; each group has `count` queries.
  template <typename Places>
  void attend(const Q* query, Q* out, int64_t count, Places places, const Groups<T>& groups, float scale) {
    for (int64_t g = groups.from; g < groups.to; g++)
      for (int64_t i = 0; i < count; i += ROWS) {
        const int64_t rows = std::min(ROWS, count - i);
        const auto place = [&](int64_t n) { return places(g, i + n); };
        int64_t last = 0;
        for (int64_t n = 0; n < rows; n++) last = std::max(last, place(n).last);
        read(query, rows, place, groups, g, 0, total_, scale);
        for (int64_t from = SEGMENT; from <= last; from += SEGMENT)
          for (int64_t n = 0; n < rows; n += QUERIES) {
            const int64_t count_of_four = std::min<int64_t>(QUERIES, rows - n);
            read(query, count_of_four, [&](int64_t m) { return place(n + m); }, groups, g, from, segment_, scale, n > 0);
            for (int64_t m = 0; m < count_of_four; m++) total_.add(n + m, segment_, m, V_);
          }
        for (int64_t n = 0; n < rows; n++) total_.write(n, out + place(n).row * V_, V_);
      }
  }

  // Only the segment of tokens that starts at `from`, into rows of `into`, group by group.
  template <typename Places>
  void attend_part(const Q* query, int64_t count, Places places, const Groups<T>& groups, int64_t from, OnlineSoftmax into, float scale) {
    for (int64_t g = groups.from; g < groups.to; g++) {
      const int64_t at = (g - groups.from) * count;
      const OnlineSoftmax own = into.from(at, V_);
      read(query, count, [&](int64_t n) { return places(g, n); }, groups, g, from, own, scale);
    }
  }
  // Combine the parts of all segments, `part_stride` floats apart, into the first one, and write the result to `out`.
  template <typename Places>
  void merge_parts(float* parts, int64_t part_stride, int64_t segments, Q* out, int64_t count, Places places, const Groups<T>& groups) {
    const int64_t total = count * (groups.to - groups.from);
    OnlineSoftmax sum(parts, total);
    for (int64_t at = 0; at < total; at++) {
      for (int64_t s = 1; s < segments; s++) sum.add(at, OnlineSoftmax(parts + s * part_stride, total), at, V_);
      sum.write(at, out + places(groups.from + at / count, at % count).row * V_, V_);
    }
  }

 private:
  static constexpr int64_t ROWS = 96;

  // The segment that starts at `from`, for rows [0, rows) of one group.
  template <typename At>
  void read(const Q* query, int64_t rows, At place, const Groups<T>& groups, int64_t g, int64_t from, OnlineSoftmax into, float scale, bool is_cached = false) {
    Pages<T> keys = groups.keys, values = groups.values;
    keys.base += g * groups.key_g, values.base += g * groups.value_g;
    keys.ahead = groups.prefetches && g == groups.from ? keys.stride : 0;  // for all groups
    for (int64_t n = 0; n < rows; n += QUERIES) {
      const Q* queries[QUERIES];
      float *to[QUERIES], top[QUERIES], mass[QUERIES];
      int64_t seen[QUERIES], end = from;
      for (int h = 0; h < QUERIES; h++) {  // the last row repeats up to four
        const int64_t row = std::min<int64_t>(n + h, rows - 1);
        const auto found = place(row);
        queries[h] = query + found.row * W_, to[h] = into.out + row * V_;
        seen[h] = std::min(found.last + 1, from + SEGMENT), end = std::max(end, seen[h]);
      }
      score_tokens(queries, keys, scores_, W_, from, end, is_cached || n > 0);
      for (int h = 0; h < QUERIES; h++)
        for (int64_t s = std::max(seen[h], from); s < end; s++) scores_[(s - from) * QUERIES + h] = -INFINITY;
      softmax_weights(scores_, end - from, scale, top, mass);
      weighted_sum(scores_, values, to, V_, from, end);
      for (int h = 0; h < std::min<int64_t>(QUERIES, rows - n); h++) into.top[n + h] = top[h], into.mass[n + h] = mass[h];
    }
  }

  const int64_t W_, V_;
  Scratch scratch_;
  float* scores_;
  OnlineSoftmax total_, segment_;  // of all segments so far; of the current one
};
