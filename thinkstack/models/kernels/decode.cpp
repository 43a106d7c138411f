// New tokens read their sequences' cached context. Heads that share entries read them together: all heads of
// multi-head latent attention, the heads of a group in grouped-query attention. So do the tokens of a prompt.
#include "decode.h"

#include <memory>
#include <vector>

// Queries, keys and values of N new tokens in grouped-query attention, as they come from their projection.
struct AttendNew {
  const bf16* qkv;                 // (N, (H + 2 G) W): heads of queries, keys, values
  const float *q_norm, *k_norm;    // (W,), or null
  const float* rope;               // (N, W / 2) pairs
  const int64_t* last;             // (N,): the token's place in its sequence
  const int32_t *tables, *owner;   // as in Decode
  bf16 *query, *entries, *out;     // (N, H, W), scratch; (blocks, 2^shift, 2 G W): keys, then values; (N, H, W)
  int64_t N, H, G, W, shift, table_width, interleaved, longest, threads;
  double scale, eps;
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

// The new tokens' entries go to the cache, then the tokens read it.
extern "C" void attend_new(const AttendNew* a) {
  const int64_t W = a->W, heads = a->H + 2 * a->G, width = 2 * a->G * W;
#pragma omp parallel num_threads(a->threads)
  {
    std::vector<float> room(W);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < a->N; n++) {
      const bf16* head = a->qkv + n * heads * W;
      const Pages<bf16> pages{a->entries, a->tables + a->owner[n] * a->table_width, a->shift, width};
      bf16* entry = pages.at(a->last[n]);
      for (int64_t h = 0; h < a->H + a->G; h++, head += W) {
        const bool is_key = h >= a->H;
        bf16* to = is_key ? entry + (h - a->H) * W : a->query + (n * a->H + h) * W;
        place_head(head, is_key ? a->k_norm : a->q_norm, a->eps, a->rope + n * W, a->interleaved, to, W, room.data());
      }
      std::copy(head, head + a->G * W, entry + a->G * W);
    }
  }
  Decode read{a->query, a->entries, a->tables, a->owner, a->last, a->out, a->N, a->G, a->H / a->G, W, W, a->shift, a->table_width, width};
  read.key_g = read.value_g = W, read.value_at = a->G * W, read.longest = a->longest, read.threads = a->threads, read.scale = a->scale;
  decode(&read, 1);
}
