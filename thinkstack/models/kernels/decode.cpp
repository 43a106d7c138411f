// One new token per sequence reads its cached context. Heads that share entries read them together: all heads of
// multi-head latent attention, the heads of a group in grouped-query attention.
#include "context.h"

#include <memory>

// B sequences, G groups, Q query heads per group, W key width, V value width. Strides are in elements.
struct Decode {
  const void* query;    // (B, G, Q, W)
  const void* entries;  // of one layer: sequence b's token s starts at b * entries_b + s * entries_s
  const int64_t* last;  // (B,): the last token each query sees; the first is 0
  void* out;            // (B, G, Q, V)
  int64_t B, G, Q, W, V, entries_b, entries_s;
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
    for (int64_t i = 0; i < a.B * a.G; i++) {
      const int64_t b = i / a.G, g = i % a.G;
      const T* entries = static_cast<const T*>(a.entries) + b * a.entries_b;
      for (int64_t h = 0; h < a.Q; h += HEADS) {
        const int64_t count = std::min<int64_t>(HEADS, a.Q - h), at = i * a.Q + h;
        attend_to(static_cast<const T*>(a.query) + at * a.W, entries + g * a.key_g, entries + a.value_at + g * a.value_g,
                  static_cast<T*>(a.out) + at * a.V, scores.get(), count, a.W, a.V, a.entries_s, a.last[b], float(a.scale));
      }
    }
  }
}

}  // namespace

extern "C" void decode(const Decode* a, int64_t is_bf16) { is_bf16 ? run<bf16>(*a) : run<float>(*a); }
