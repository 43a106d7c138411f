// Attention of queries over the cached entries of one sequence in bf16: up to ROWS queries per cache block, as two matrix
// products around an online softmax (after FlashAttention, arXiv:2205.14135).
//
// The result of a query does not depend on the others.
#pragma once
#include "context.h"

#include <type_traits>

// Interleave two vectors of bf16: `first` gets the pairs of their first halves, `last` those of their second halves.
inline void interleave(const bf16* a, const bf16* b, uint32_t* first, uint32_t* last) {
  const vhh x = (vhh)load_units(reinterpret_cast<const uint32_t*>(a)), y = (vhh)load_units(reinterpret_cast<const uint32_t*>(b));
  store_units(first, (vu)shuffle<Zipped<0, 2 * LANES>>(x, y));
  store_units(last, (vu)shuffle<Zipped<LANES, 2 * LANES>>(x, y));
}

// Prefetches the cache lines of a range in several steps.
struct Prefetcher {
  const char* next;
  int64_t lines, each;
  Prefetcher(const void* from, int64_t bytes, int64_t times) : next((const char*)from), lines((bytes + 63) / 64), each((lines + times - 1) / times) {}
  void step() {
    for (int64_t i = 0; i < std::min(each, lines); i++, next += 64) __builtin_prefetch(next);
    lines -= std::min(each, lines);
  }
};

// Scratch of one thread. W: width of queries and keys, V: of values.
class TiledAttention {
 public:
  static bool takes(int64_t W, int64_t V, int64_t block) { return W % 32 == 0 && V % 32 == 0 && block % LANES == 0 && SEGMENT % block == 0; }

  // block: tokens of a block of the cache.
  TiledAttention(int64_t W, int64_t V, int64_t block)
      : W_(W), V_(V), block_(block),
        scratch_(4 * (block * (W + V) / 2 + ROWS * (W / 2 + block / 2 + block) + 2 * OnlineSoftmax::floats(ROWS, V)) + 7 * Scratch::SLACK),
        segment_(scratch_.take<float>(OnlineSoftmax::floats(ROWS, V)), ROWS), total_(scratch_.take<float>(OnlineSoftmax::floats(ROWS, V)), ROWS) {
    keys_ = scratch_.take<uint32_t>(block * W / 2);
    values_ = scratch_.take<uint32_t>(block * V / 2);
    queries_ = scratch_.take<bf16>(ROWS * W);
    probs_ = scratch_.take<bf16>(ROWS * block);
    scores_ = scratch_.take<float>(ROWS * block);
  }

  // places(g, i): as in FourQueryAttention.
  template <typename Places>
  void attend(const bf16* query, bf16* out, int64_t count, Places places, const Groups<bf16>& groups, float scale) {
    for_each_tile(count, places, groups, [&](const Groups<bf16>& own, int64_t rows, int64_t all, auto place) {
      load_queries(query, all, place);
      const int64_t last = max_last(all);
      read(rows, all, own, 0, last, scale);
      if (last >= SEGMENT) std::swap(total_, segment_);
      for (int64_t from = SEGMENT; from <= last; from += SEGMENT) {
        read(rows, all, own, from, last, scale);
        for (int64_t n = 0; n < all; n++) total_.add(n, segment_, n, V_);
      }
      for (int64_t n = 0; n < all; n++) (last < SEGMENT ? segment_ : total_).write(n, out + place(n).row * V_, V_);
    });
  }

  // Only the segment of tokens that starts at `from`, into rows of `into`, in the order of the tiles.
  template <typename Places>
  void attend_part(const bf16* query, int64_t count, Places places, const Groups<bf16>& groups, int64_t from, OnlineSoftmax into, float scale) {
    int64_t at = 0;
    for_each_tile(count, places, groups, [&](const Groups<bf16>& own, int64_t rows, int64_t all, auto place) {
      load_queries(query, all, place);
      read(rows, all, own, from, max_last(all), scale);
      for (int64_t n = 0; n < all; n++, at++) {
        into.top[at] = segment_.top[n], into.mass[at] = segment_.mass[n];
        std::copy(segment_.out + n * V_, segment_.out + (n + 1) * V_, into.out + at * V_);
      }
    });
  }
  // Combine the parts of all segments, `part_stride` floats apart, into the first one, and write the result to `out`.
  template <typename Places>
  void merge_parts(float* parts, int64_t part_stride, int64_t segments, bf16* out, int64_t count, Places places, const Groups<bf16>& groups) {
    const int64_t total = count * (groups.to - groups.from);
    OnlineSoftmax sum(parts, total);
    int64_t at = 0;
    for_each_tile(count, places, groups, [&](const Groups<bf16>&, int64_t, int64_t all, auto place) {
      for (int64_t n = 0; n < all; n++, at++) {
        for (int64_t s = 1; s < segments; s++) sum.add(at, OnlineSoftmax(parts + s * part_stride, total), at, V_);
        sum.write(at, out + place(n).row * V_, V_);
      }
    });
  }

 private:
  static constexpr int64_t ROWS = 96, WIDE = Format<bf16>::WIDE;
  static const uint32_t* units(const bf16* p) { return reinterpret_cast<const uint32_t*>(p); }

  // each(groups, rows per group, all rows, place of each row) for tiles of at most ROWS queries of one or several groups.
  template <typename Places, typename Each>
  static void for_each_tile(int64_t count, Places places, const Groups<bf16>& groups, Each each) {
    for (int64_t i = 0; i < count; i += ROWS) {
      const int64_t rows = std::min(ROWS, count - i), together = std::max<int64_t>(ROWS / rows, 1);
      for (int64_t g = groups.from; g < groups.to; g += together) {
        Groups<bf16> own = groups;
        own.from = g, own.to = std::min(g + together, groups.to);
        each(own, rows, (own.to - g) * rows, [&](int64_t n) { return places(g + n / rows, i + n % rows); });
      }
    }
  }

  template <typename Place>
  void load_queries(const bf16* query, int64_t all, Place place) {
    for (int64_t n = 0; n < all; n++) {
      const auto found = place(n);
      std::copy(query + found.row * W_, query + (found.row + 1) * W_, queries_ + n * W_);
      last_[n] = found.last;
    }
  }
  int64_t max_last(int64_t all) const { return *std::max_element(last_, last_ + all); }

  // The segment that starts at `from`, up to token `last`, into segment_.
  void read(int64_t rows, int64_t all, const Groups<bf16>& groups, int64_t from, int64_t last, float scale) {
    const int64_t end = std::min(last + 1, from + SEGMENT), stride = groups.keys.stride;
    segment_.clear(all, V_);
    for (int64_t s = from; s < end; s += block_) {
      const int64_t tokens = std::min(end - s, block_), columns = round_up(tokens), later = std::min(last + 1 - s - block_, block_);
      const bf16 *entries = groups.keys.at(s), *next = later > 0 ? groups.keys.at(s + block_) : groups.next_block;
      const int64_t times = (groups.to - groups.from) * (columns / LANES * (W_ / WIDE) + (tokens + 1) / 2);
      Prefetcher prefetcher(next, groups.prefetches && next ? (later > 0 ? later : block_) * stride * sizeof(bf16) : 0, times);
      for (int64_t g = groups.from, row = 0; g < groups.to; g++, row += rows) {
        pack_transposed(units(entries + g * groups.key_g), stride / 2, keys_, columns, W_ / 2, [&] { prefetcher.step(); });
        multiply<uint32_t>({units(queries_ + row * W_), W_ / 2, 1}, keys_, columns, scores_, columns, rows, columns, W_ / 2, false);
        for (int64_t n = 0; n < rows; n++) softmax_weights(row + n, n, std::min(last_[row + n] + 1 - s, tokens), columns, scale);
        pack_values(groups.values.at(s) + g * groups.value_g, stride, tokens, prefetcher);
        multiply<uint32_t>({units(probs_), columns / 2, 1}, values_, V_, segment_.out + row * V_, V_, rows, V_, (tokens + 1) / 2, true);
      }
    }
  }

  void pack_values(const bf16* value, int64_t stride, int64_t tokens, Prefetcher& prefetcher) {
    static const bf16 zeros[WIDE] = {};
    for (int64_t t = 0; t < tokens; t += 2, prefetcher.step())
      for (int64_t c = 0; c < V_; c += WIDE) {
        uint32_t* to = values_ + t / 2 * V_ + c;
        interleave(value + t * stride + c, t + 1 < tokens ? value + (t + 1) * stride + c : zeros, to, to + LANES);
      }
  }

  // Replace the scores of a row by probabilities relative to the largest score so far.
  void softmax_weights(int64_t row, int64_t n, int64_t seen, int64_t columns, float scale) {
    float* scores = scores_ + n * columns;
    for (int64_t t = std::max<int64_t>(seen, 0); t < columns; t++) scores[t] = -INFINITY;
    vf best = splat(segment_.top[row]), total{};
    for (int64_t c = 0; c < columns; c += LANES) best = larger(load(scores + c) * scale, best);
    const float top = largest(best), zero = seen > 0 ? top : 0;  // a row without keys so far has no score
    for (int64_t c = 0; c < columns; c += LANES) {
      const vf p = exp_of(load(scores + c) * scale - zero);
      total += p;
      store(probs_ + n * columns + c, p);
    }
    if (seen > 0) segment_.raise(row, top, V_);
    segment_.mass[row] += sum(total);
  }

  const int64_t W_, V_, block_;
  Scratch scratch_;
  OnlineSoftmax segment_, total_;  // of the current segment; of the segments before
  uint32_t *keys_, *values_;
  bf16 *queries_, *probs_;
  float* scores_;
  int64_t last_[ROWS];
};

// Attention over a cache with the scratch of one thread: TiledAttention where it is supported, else FourQueryAttention.
template <typename Q, typename T>
class ThreadAttention {
 public:
  // block: tokens of a block of the cache.
  ThreadAttention(int64_t W, int64_t V, int64_t block) {
    if (std::is_same<Q, bf16>::value && TiledAttention::takes(W, V, block)) tiled_.reset(new TiledAttention(W, V, block));
    else four_query_.reset(new FourQueryAttention<Q, T>(W, V));
  }

  // work(TiledAttention or FourQueryAttention).
  template <typename Work>
  void with(Work work) {
    if constexpr (std::is_same<Q, bf16>::value)
      if (tiled_) return work(*tiled_);
    work(*four_query_);
  }

 private:
  std::unique_ptr<TiledAttention> tiled_;
  std::unique_ptr<FourQueryAttention<Q, T>> four_query_;
};
