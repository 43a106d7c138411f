// Attention of new tokens over their sequences' cached contexts: arguments, division among threads, and preparation of heads.
#pragma once
#include "tiles.h"

#include <vector>

// N tokens, G groups, Q query heads per group, W key width, V value width.
struct PagedAttention {
  const void* query;      // (N, G, Q, W)
  const void* entries;    // of one layer, (blocks, 2^shift, entry_width)
  const int32_t* block_tables;  // (sequences, table_width): the blocks of each, in order
  const int32_t* seq_index;   // (N,): the sequence of each token
  const int64_t* last;    // (N,): the last token of the sequence that it attends to, from 0
  void* out;              // (N, G, Q, V)
  int64_t N, G, Q, W, V, shift, table_width, entry_width;
  int64_t key_g = 0, value_g = 0, value_at = 0;  // the key of group g starts at g * key_g, its value at value_at + g * value_g
  int64_t threads = 1;
  double scale = 1;  // of the scores
};

// The arguments for N tokens of grouped-query attention over entries of keys, then values. A: GQAPass or AttendGQA.
template <typename A>
PagedAttention paged_gqa(const A& a, int64_t N, const void* query, const void* entries, void* out) {
  PagedAttention read{query, entries, a.block_tables, a.seq_index, a.last, out, N, a.G, a.H / a.G, a.W, a.W, a.shift, a.table_width, 2 * a.G * a.W};
  read.key_g = read.value_g = a.W, read.value_at = a.G * a.W;
  read.threads = a.threads, read.scale = a.scale;
  return read;
}

// Paged attention by a team of threads. A run of tokens of one sequence is computed by one thread; if there are few runs,
// each group of heads by one thread, or, for short runs, each segment of the context. Q, T: types of queries and cache.
template <typename Q, typename T>
class PagedAttentionJob {
 public:
  explicit PagedAttentionJob(const PagedAttention& a) : a_(a) {
    for (int64_t n = 0; n < a.N; n += runs_.back().count) runs_.push_back({n, sequence_run(a.seq_index, n, a.N, TOKENS)});
    has_many_runs_ = int64_t(runs_.size()) >= 4 * a.threads;
    const bool are_short = std::all_of(runs_.begin(), runs_.end(), [](const Run& run) { return run.count <= SHORT; });
    if (has_many_runs_ || !are_short) return;
    int64_t rows = 0;
    for (int64_t n = 0; n < int64_t(runs_.size()); n++) {
      const Run& run = runs_[n];
      rows = std::max(rows, run.count * a.Q * a.G);
      const int64_t last = *std::max_element(a.last + run.start, a.last + run.start + run.count);
      for (int64_t from = 0; from <= last; from += SEGMENT) parts_.push_back({n, from});
    }
    if (int64_t(parts_.size()) < a.threads) parts_.clear();
    part_stride_ = OnlineSoftmax::floats(rows, a.V);
    buffer_ = make_buffer<float>(part_stride_ * parts_.size());
  }

  ThreadAttention<Q, T> attention() const { return {a_.W, a_.V, 1 << a_.shift}; }

  // All threads of the team call it. entries: of a layer, in place of those in the arguments.
  void work(ThreadAttention<Q, T>& attention, const T* entries) {
    if (!parts_.empty()) return attend_by_segments(attention, entries);
    const int64_t groups_per_task = has_many_runs_ ? a_.G : 1;  // the first group loads entries into the cache for the others
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < int64_t(runs_.size()) * a_.G / groups_per_task; i++) {
      const int64_t n = i * groups_per_task / a_.G, g = i * groups_per_task % a_.G, later = std::min<int64_t>(n + a_.threads, runs_.size() - 1);
      Groups<T> groups = groups_of(n, entries, g, g + groups_per_task);
      groups.prefetches = has_many_runs_, groups.next_block = pages(later, entries).at(0);
      attention.with([&](auto& read) { read.attend(query(), out(), runs_[n].count * a_.Q, places(n), groups, float(a_.scale)); });
    }
  }

 private:
  static constexpr int64_t TOKENS = 32, SHORT = 8;  // most tokens of a run; of a short one
  struct Run {
    int64_t start, count;
  };
  struct Part {
    int64_t run, from;
  };

  void attend_by_segments(ThreadAttention<Q, T>& attention, const T* entries) {
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < int64_t(parts_.size()); i++) {
      const int64_t n = parts_[i].run, count = runs_[n].count * a_.Q;
      Groups<T> groups = groups_of(n, entries, 0, a_.G);
      groups.prefetches = true;
      const OnlineSoftmax into(buffer_.get() + i * part_stride_, count * a_.G);
      attention.with([&](auto& read) { read.attend_part(query(), count, places(n), groups, parts_[i].from, into, float(a_.scale)); });
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < int64_t(parts_.size()); i++) {
      const int64_t n = parts_[i].run;
      if (parts_[i].from > 0) continue;
      int64_t segments = 1;
      while (i + segments < int64_t(parts_.size()) && parts_[i + segments].run == n) segments++;
      float* first = buffer_.get() + i * part_stride_;
      attention.with([&](auto& read) { read.merge_parts(first, part_stride_, segments, out(), runs_[n].count * a_.Q, places(n), groups_of(n, entries, 0, a_.G)); });
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
  bool has_many_runs_;
  std::vector<Part> parts_;  // if segments are computed separately: run by run, in order
  int64_t part_stride_ = 0;        // floats of a part
  Buffer<float> buffer_;
};

// Norms a projected head of width W, if `weight` is not null, rotates it, and writes it to `to`. buffer: W floats, which may
// be the head itself.
template <typename From, typename To>
void norm_and_rotate_head(const From* head, const float* weight, double eps, const float* rope, bool interleaved, To* to, int64_t W, float* buffer) {
  if (weight) {
    copy_row(head, to, W);
    norm_row(to, weight, to, W, eps);
    copy_row(to, buffer, W);
  } else {
    copy_row(head, buffer, W);
  }
  rotate_pairs(buffer, rope, W, interleaved, 1);
  copy_row(buffer, to, W);
}
