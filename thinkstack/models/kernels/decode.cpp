// New tokens read their sequences' cached context. Heads that share entries read them together: all heads of
// multi-head latent attention, the heads of a group in grouped-query attention. So do the tokens of a prompt.
#include "context.h"

#include <memory>
#include <vector>

// N tokens, G groups, Q query heads per group, W key width, V value width.
struct Decode {
  const void* query;      // (N, G, Q, W)
  const void* entries;    // of one layer, (blocks, 2^shift, entry width)
  const int32_t* tables;  // (sequences, table_width): the blocks of each, in order
  const int32_t* owner;   // (N,): the sequence of each token
  const int64_t* last;    // (N,): the last token of it that it sees; the first is 0
  void* out;              // (N, G, Q, V)
  int64_t N, G, Q, W, V, shift, table_width, entry_width;
  int64_t key_g, value_g, value_at;  // group g's key starts at g * key_g, its value at value_at + g * value_g
  int64_t longest, threads;
  double scale;  // of the scores
};

namespace {

constexpr int64_t TOKENS = 16;  // of one sequence at a time

template <typename T>
void run(const Decode& a) {
  struct Run {
    int64_t start, count;
  };
  std::vector<Run> runs;
  for (int64_t n = 0; n < a.N; n += runs.back().count) runs.push_back({n, run_of(a.owner, n, a.N, TOKENS)});
  // Many runs: the groups of one on one thread, which finds in its cache what the first group has brought there.
  const int64_t together = int64_t(runs.size()) >= 4 * a.threads ? a.G : 1;
#pragma omp parallel num_threads(a.threads)
  {
    std::unique_ptr<float[]> scores(new float[QUERIES * round_up(a.longest + 4)]);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < int64_t(runs.size()) * a.G / together; i++) {
      const Run run = runs[i * together / a.G];
      const int32_t* blocks = a.tables + a.owner[run.start] * a.table_width;
      const T* entries = static_cast<const T*>(a.entries);
      for (int64_t g = i * together % a.G, end = g + together; g < end; g++) {
        const int64_t ahead = together > 1 && g == 0 ? a.entry_width : 0;
        const Pages<T> keys{entries + g * a.key_g, blocks, a.shift, a.entry_width, ahead};
        const Pages<T> values{entries + a.value_at + g * a.value_g, blocks, a.shift, a.entry_width};
        const auto places = [&](int64_t i) {
          const int64_t n = run.start + i / a.Q;
          return Place{(n * a.G + g) * a.Q + i % a.Q, a.last[n]};
        };
        attend_to(static_cast<const T*>(a.query), static_cast<T*>(a.out), run.count * a.Q, places, keys, values, scores.get(), a.W, a.V,
                  float(a.scale));
      }
    }
  }
}

}  // namespace

extern "C" void decode(const Decode* a, int64_t is_bf16) { is_bf16 ? run<bf16>(*a) : run<float>(*a); }
