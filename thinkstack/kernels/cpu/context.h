// Queries over the cached entries of one sequence: decoding, and prompts piece by piece.
//
// Queries go by fours, whichever heads and tokens they are of. What comes of one does not depend on the others: sums run
// in the same order, and what a query does not see adds zeros at their end.
#pragma once
#include "matmul.h"

#include <algorithm>
#include <functional>

constexpr int QUERIES = 4;          // at a time
constexpr int64_t AHEAD = 6 << 10;  // bytes between what is read and what is fetched
constexpr int64_t SEGMENT = 1024;   // tokens that are read in one go; what came of several is added in their order

// Part of the cached entries of one sequence: token s lies in block blocks[s >> shift], blocks hold 2^shift tokens.
template <typename T>
struct Pages {
  const T* base;
  const int32_t* blocks;
  int64_t shift, stride;  // elements from token to token
  int64_t ahead = 0;      // elements of each token to fetch before they are asked for

  T* at(int64_t s) const { return const_cast<T*>(base) + (((int64_t)blocks[s >> shift] << shift) + (s & ((1 << shift) - 1))) * stride; }

  // each(s, address, count) for tokens [first, end) in order, as many as lie together; a block begins at the first.
  template <typename Each>
  void through(int64_t first, int64_t end, Each each) const {
    for (int64_t s = first; s < end; s += 1 << shift) each(s, at(s), std::min<int64_t>(end - s, 1 << shift));
  }
};

// Groups [from, to) of heads over the entries of one sequence: group g's keys and values lie key_g and value_g elements
// behind those of the one before.
template <typename T>
struct Groups {
  Pages<T> keys, values;  // of group 0
  int64_t from, to, key_g, value_g;
  bool fetches = false;         // whether to ask for entries before they are needed
  const T* upcoming = nullptr;  // what is read after them
};

// What some queries have read: their largest score, the sum of e^(score - top), and the values mixed by these.
struct Mixed {
  float *top, *mass, *out;  // (rows,), (rows,), (rows, V)

  static int64_t floats(int64_t rows, int64_t V) { return rows * (V + 2); }
  Mixed(float* room, int64_t rows) : top(room), mass(room + rows), out(room + 2 * rows) {}
  Mixed from(int64_t row, int64_t V) const {
    Mixed own = *this;
    own.top += row, own.mass += row, own.out += row * V;
    return own;
  }

  void clear(int64_t rows, int64_t V) {
    std::fill(top, top + rows, -INFINITY);
    std::fill(mass, mass + rows, 0.0f);
    std::fill(out, out + rows * V, 0.0f);
  }
  // Row n counts so much less, because scores up to `most` were found.
  void raise(int64_t n, float most, int64_t V) {
    if (most == top[n]) return;
    const float less = exp_of(splat(top[n] - most))[0];
    top[n] = most, mass[n] *= less;
    for (int64_t c = 0; c < V; c += LANES) store_some(out + n * V + c, load_some(out + n * V + c, V - c) * less, V - c);
  }
  // Row n of what was read of other tokens, which is spoilt.
  void add(int64_t n, Mixed other, int64_t m, int64_t V) {
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

// Vectors a and b are summed a step further, within four lanes that lie together: those BY apart.
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
// The sums of four vectors, side by side.
inline void sums(const vf x[4], float out[4]) {
  const v4 found = in_four(fold<2>(fold<1>(x[0], x[1]), fold<1>(x[2], x[3])));
  std::memcpy(out, &found, sizeof(found));
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

// scores[j * QUERIES + h] of COUNT keys, `stride` apart, and the queries of width W at the addresses given.
template <int COUNT, typename Q, typename T>
void score_keys(const Q* const query[QUERIES], const T* key, int64_t stride, float* scores, int64_t W) {
  using F = Together<Q, T>;
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
constexpr int KEYS = REGISTERS / 8, MIXED = REGISTERS / 8;  // keys that four queries meet at a time; vectors of a value
// Keys [first, end): one by one where they come from memory, which foresees a single stream, else several at a time.
template <typename Q, typename T>
void score(const Q* const query[QUERIES], const Pages<T>& keys, float* scores, int64_t W, int64_t first, int64_t end, bool is_cached) {
  keys.through(first, end, [&](int64_t s, const T* key, int64_t count) {
    float* own = scores + (s - first) * QUERIES;
    const T* next = s + count < end ? keys.at(s + count) : key;
    const int64_t ahead = (AHEAD / int64_t(sizeof(T)) + keys.stride - 1) / keys.stride;
    int64_t j = 0;
    if (is_cached)
      for (; j + KEYS <= count; j += KEYS) score_keys<KEYS>(query, key + j * keys.stride, keys.stride, own + j * QUERIES, W);
    for (; j < count; j++) {
      const T* later = j + ahead < count ? key + (j + ahead) * keys.stride : next + (j + ahead - count) * keys.stride;
      for (int64_t c = 0; c < keys.ahead; c += 64 / int64_t(sizeof(T))) __builtin_prefetch(later + c);
      score_keys<1>(query, key + j * keys.stride, keys.stride, own + j * QUERIES, W);
    }
  });
}

// Every QUERIES-th of N * QUERIES numbers, combined by pairs.
template <int N, typename Combine>
inline float combined(const float* x, Combine combine) {
  if constexpr (N == 1) return x[0];
  else return combine(combined<N / 2>(x, combine), combined<N / 2>(x + N / 2 * QUERIES, combine));
}

// scores[s * QUERIES + h] of `count` tokens become e^(score - top), and each query's top and their sum are noted; some
// tokens of four queries at a time. A query that sees none of them has no top.
inline void weigh(float* scores, int64_t count, float scale, float top[QUERIES], float mass[QUERIES]) {
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
void mix_columns(const float* weights, const Pages<T>& values, float* const out[QUERIES], int64_t c, int64_t V, int64_t first, int64_t end) {
  vf total[QUERIES][VECTORS] = {};
  values.through(first, end, [&](int64_t s, const T* entry, int64_t count) {
    const float* own = weights + (s - first) * QUERIES;
    for (int64_t i = 0; i < count; i++, entry += values.stride, own += QUERIES)
      UNROLLED for (int j = 0; j < VECTORS; j++) {
        const vf value = VECTORS > 1 ? load(entry + c + j * LANES) : load_some(entry + c, V - c);
        UNROLLED for (int h = 0; h < QUERIES; h++) total[h][j] += own[h] * value;
      }
  });
  UNROLLED for (int h = 0; h < QUERIES; h++)
    UNROLLED for (int j = 0; j < VECTORS; j++) store_some(out[h] + c + j * LANES, total[h][j], V - c - j * LANES);
}
template <typename T>
void mix(const float* weights, const Pages<T>& values, float* const out[QUERIES], int64_t V, int64_t first, int64_t end) {
  int64_t c = 0;
  for (; c + MIXED * LANES <= V; c += MIXED * LANES) mix_columns<MIXED>(weights, values, out, c, V, first, end);
  for (; c < V; c += LANES) mix_columns<1>(weights, values, out, c, V, first, end);
}

struct Place {
  int64_t row, last;
};

// Consecutive tokens of one sequence, at most `limit`, from `start`; seq_index: (end,).
inline int64_t run_of(const int32_t* seq_index, int64_t start, int64_t end, int64_t limit) {
  int64_t n = start + 1;
  while (n < end && n - start < limit && seq_index[n] == seq_index[start]) n++;
  return n - start;
}

// Scratch of one thread. W: width of queries and keys, V: of values; Q, T: types of queries and of the cache.
template <typename Q, typename T>
class Fours {
 public:
  Fours(int64_t W, int64_t V)
      : W_(W), V_(V), scratch_(4 * (QUERIES * SEGMENT + Mixed::floats(ROWS, V) + Mixed::floats(QUERIES, V)) + 3 * Scratch::SLACK),
        scores_(scratch_.take<float>(QUERIES * SEGMENT)), all_(scratch_.take<float>(Mixed::floats(ROWS, V)), ROWS),
        more_(scratch_.take<float>(Mixed::floats(QUERIES, V)), QUERIES) {}

  // places(g, i): where query i of group g and its answer lie, and the last token that it sees; each group has `count`.
  template <typename Places>
  void attend(const Q* query, Q* out, int64_t count, Places places, const Groups<T>& groups, float scale) {
    for (int64_t g = groups.from; g < groups.to; g++)
      for (int64_t i = 0; i < count; i += ROWS) {
        const int64_t rows = std::min(ROWS, count - i);
        const auto place = [&](int64_t n) { return places(g, i + n); };
        int64_t last = 0;
        for (int64_t n = 0; n < rows; n++) last = std::max(last, place(n).last);
        read(query, rows, place, groups, g, 0, all_, scale);
        for (int64_t from = SEGMENT; from <= last; from += SEGMENT)
          for (int64_t n = 0; n < rows; n += QUERIES) {
            const int64_t some = std::min<int64_t>(QUERIES, rows - n);
            read(query, some, [&](int64_t m) { return place(n + m); }, groups, g, from, more_, scale, n > 0);
            for (int64_t m = 0; m < some; m++) all_.add(n + m, more_, m, V_);
          }
        for (int64_t n = 0; n < rows; n++) all_.write(n, out + place(n).row * V_, V_);
      }
  }

  // Only the tokens of the segment that begins at `from`, into rows of `into`, group by group.
  template <typename Places>
  void attend_part(const Q* query, int64_t count, Places places, const Groups<T>& groups, int64_t from, Mixed into, float scale) {
    for (int64_t g = groups.from; g < groups.to; g++) {
      const int64_t at = (g - groups.from) * count;
      const Mixed own = into.from(at, V_);
      read(query, count, [&](int64_t n) { return places(g, n); }, groups, g, from, own, scale);
    }
  }
  // The parts of all segments, `apart` floats from each other, to `out`. The first becomes their sum.
  template <typename Places>
  void join(float* parts, int64_t apart, int64_t segments, Q* out, int64_t count, Places places, const Groups<T>& groups) {
    const int64_t total = count * (groups.to - groups.from);
    Mixed sum(parts, total);
    for (int64_t at = 0; at < total; at++) {
      for (int64_t s = 1; s < segments; s++) sum.add(at, Mixed(parts + s * apart, total), at, V_);
      sum.write(at, out + places(groups.from + at / count, at % count).row * V_, V_);
    }
  }

 private:
  static constexpr int64_t ROWS = 96;

  // The segment from `from` on, for rows 0..rows of one group.
  template <typename At>
  void read(const Q* query, int64_t rows, At place, const Groups<T>& groups, int64_t g, int64_t from, Mixed into, float scale, bool is_cached = false) {
    Pages<T> keys = groups.keys, values = groups.values;
    keys.base += g * groups.key_g, values.base += g * groups.value_g;
    keys.ahead = groups.fetches && g == groups.from ? keys.stride : 0;  // for all groups
    for (int64_t n = 0; n < rows; n += QUERIES) {
      const Q* asks[QUERIES];
      float *to[QUERIES], top[QUERIES], mass[QUERIES];
      int64_t seen[QUERIES], end = from;
      for (int h = 0; h < QUERIES; h++) {  // the last one fills up the four
        const int64_t row = std::min<int64_t>(n + h, rows - 1);
        const auto found = place(row);
        asks[h] = query + found.row * W_, to[h] = into.out + row * V_;
        seen[h] = std::min(found.last + 1, from + SEGMENT), end = std::max(end, seen[h]);
      }
      score(asks, keys, scores_, W_, from, end, is_cached || n > 0);
      for (int h = 0; h < QUERIES; h++)
        for (int64_t s = std::max(seen[h], from); s < end; s++) scores_[(s - from) * QUERIES + h] = -INFINITY;
      weigh(scores_, end - from, scale, top, mass);
      mix(scores_, values, to, V_, from, end);
      for (int h = 0; h < std::min<int64_t>(QUERIES, rows - n); h++) into.top[n + h] = top[h], into.mass[n + h] = mass[h];
    }
  }

  const int64_t W_, V_;
  Scratch scratch_;
  float* scores_;
  Mixed all_, more_;  // of all segments so far; of the one that is being read
};
