// Attention of new tokens over their sequences' cached contexts: what the kernel is given, and how heads get there.
#pragma once
#include "tiles.h"

#include <vector>

// N tokens, G groups, Q query heads per group, W key width, V value width.
struct PagedAttention {
  const void* query;      // (N, G, Q, W)
  const void* entries;    // of one layer, (blocks, 2^shift, entry_width)
  const int32_t* block_tables;  // (sequences, table_width): the blocks of each, in order
  const int32_t* seq_index;   // (N,): the sequence of each token
  const int64_t* last;    // (N,): the last token of it that it sees; the first is 0
  void* out;              // (N, G, Q, V)
  int64_t N, G, Q, W, V, shift, table_width, entry_width;
  int64_t key_g, value_g, value_at;  // group g's key starts at g * key_g, its value at value_at + g * value_g
  int64_t threads;
  double scale;  // of the scores
};

// How N tokens of grouped queries read a cache of keys, then values: of GQAPass or AttendGQA.
template <typename A>
PagedAttention grouped(const A& a, int64_t N, const void* query, const void* entries, void* out) {
  PagedAttention read{query, entries, a.block_tables, a.seq_index, a.last, out, N, a.G, a.H / a.G, a.W, a.W, a.shift, a.table_width, 2 * a.G * a.W};
  read.key_g = read.value_g = a.W, read.value_at = a.G * a.W;
  read.threads = a.threads, read.scale = a.scale;
  return read;
}

// What a team of threads does together. Runs of tokens of one sequence are read by one thread each; where there are few,
// each group of their heads by another, or, for short runs, each segment of their context. Q, T: types of queries and of
// the cache.
template <typename Q, typename T>
class Attend {
 public:
  explicit Attend(const PagedAttention& a) : a_(a) {
    for (int64_t n = 0; n < a.N; n += runs_.back().count) runs_.push_back({n, run_of(a.seq_index, n, a.N, TOKENS)});
    is_many_ = int64_t(runs_.size()) >= 4 * a.threads;
    const bool are_short = std::all_of(runs_.begin(), runs_.end(), [](const Run& run) { return run.count <= SHORT; });
    if (is_many_ || !are_short) return;
    int64_t rows = 0;
    for (int64_t n = 0; n < int64_t(runs_.size()); n++) {
      const Run& run = runs_[n];
      rows = std::max(rows, run.count * a.Q * a.G);
      const int64_t last = *std::max_element(a.last + run.start, a.last + run.start + run.count);
      for (int64_t from = 0; from <= last; from += SEGMENT) parts_.push_back({n, from});
    }
    if (int64_t(parts_.size()) < a.threads) parts_.clear();
    apart_ = Mixed::floats(rows, a.V);
    room_ = room_for<float>(apart_ * parts_.size());
  }

  Reader<Q, T> reader() const { return {a_.W, a_.V, 1 << a_.shift}; }

  // All threads of a team call it; entries: of a layer, in place of the first one's.
  void work(Reader<Q, T>& reader, const T* entries) {
    if (!parts_.empty()) return by_segments(reader, entries);
    const int64_t together = is_many_ ? a_.G : 1;  // the first group brings what the others then find in the thread's cache
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < int64_t(runs_.size()) * a_.G / together; i++) {
      const int64_t n = i * together / a_.G, g = i * together % a_.G, later = std::min<int64_t>(n + a_.threads, runs_.size() - 1);
      Groups<T> groups = groups_of(n, entries, g, g + together);
      groups.fetches = is_many_, groups.upcoming = pages(later, entries).at(0);
      reader.with([&](auto& read) { read.attend(query(), out(), runs_[n].count * a_.Q, places(n), groups, float(a_.scale)); });
    }
  }

 private:
  static constexpr int64_t TOKENS = 32, SHORT = 8;  // of a run at most; of a short one
  struct Run {
    int64_t start, count;
  };
  struct Part {
    int64_t run, from;
  };

  void by_segments(Reader<Q, T>& reader, const T* entries) {
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < int64_t(parts_.size()); i++) {
      const int64_t n = parts_[i].run, count = runs_[n].count * a_.Q;
      Groups<T> groups = groups_of(n, entries, 0, a_.G);
      groups.fetches = true;
      const Mixed into(room_.get() + i * apart_, count * a_.G);
      reader.with([&](auto& read) { read.attend_part(query(), count, places(n), groups, parts_[i].from, into, float(a_.scale)); });
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < int64_t(parts_.size()); i++) {
      const int64_t n = parts_[i].run;
      if (parts_[i].from > 0) continue;
      int64_t segments = 1;
      while (i + segments < int64_t(parts_.size()) && parts_[i + segments].run == n) segments++;
      float* first = room_.get() + i * apart_;
      reader.with([&](auto& read) { read.join(first, apart_, segments, out(), runs_[n].count * a_.Q, places(n), groups_of(n, entries, 0, a_.G)); });
    }
  }

  const Q* query() const { return static_cast<const Q*>(a_.query); }
  Q* out() const { return static_cast<Q*>(a_.out); }
  Pages<T> pages(int64_t run, const T* entries) const {
    return {entries, a_.block_tables + a_.seq_index[runs_[run].start] * a_.table_width, a_.shift, a_.entry_width};
  }
  Groups<T> groups_of(int64_t run, const T* entries, int64_t from, int64_t to) const {
    return {pages(run, entries), pages(run, entries + a_.value_at), from, to, a_.key_g, a_.value_g};
  }
  auto places(int64_t run) const {
    return [this, start = runs_[run].start](int64_t g, int64_t i) {
      const int64_t token = start + i / a_.Q;
      return Place{(token * a_.G + g) * a_.Q + i % a_.Q, a_.last[token]};
    };
  }

  const PagedAttention a_;
  std::vector<Run> runs_;
  bool is_many_;
  std::vector<Part> parts_;  // where segments are read apart: run by run, in order
  int64_t apart_ = 0;        // floats of a part
  Room<float> room_;
};

// A projected head of width W, normed where there is a weight and rotated, to where attention reads it. room: W floats,
// which may be the head itself.
template <typename From, typename To>
void place_head(const From* head, const float* weight, double eps, const float* rope, bool interleaved, To* to, int64_t W, float* room) {
  if (weight) {
    copy_row(head, to, W);
    norm_row(to, weight, to, W, eps);
    copy_row(to, room, W);
  } else {
    copy_row(head, room, W);
  }
  turn(room, rope, W, interleaved, 1);
  copy_row(room, to, W);
}
