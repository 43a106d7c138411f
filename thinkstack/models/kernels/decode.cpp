// New tokens read their sequences' cached context. Heads that share entries read them together: all heads of
// multi-head latent attention, the heads of a group in grouped-query attention.
#include "context.h"

#include <memory>

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

template <typename T>
void run(const Decode& a) {
#pragma omp parallel num_threads(a.threads)
  {
    std::unique_ptr<float[]> scores(new float[HEADS * round_up(a.longest + 4)]);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.N * a.G; i++) {
      const int64_t n = i / a.G, g = i % a.G;
      const int32_t* blocks = a.tables + a.owner[n] * a.table_width;
      const T* entries = static_cast<const T*>(a.entries);
      const Pages<T> keys{entries + g * a.key_g, blocks, a.shift, a.entry_width};
      const Pages<T> values{entries + a.value_at + g * a.value_g, blocks, a.shift, a.entry_width};
      for (int64_t h = 0; h < a.Q; h += HEADS) {
        const int64_t count = std::min<int64_t>(HEADS, a.Q - h), at = i * a.Q + h;
        attend_to(static_cast<const T*>(a.query) + at * a.W, keys, values, static_cast<T*>(a.out) + at * a.V, scores.get(), count, a.W,
                  a.V, a.last[n], float(a.scale));
      }
    }
  }
}

}  // namespace

extern "C" void decode(const Decode* a, int64_t is_bf16) { is_bf16 ? run<bf16>(*a) : run<float>(*a); }
