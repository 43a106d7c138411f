// One new token per sequence reads its cached context. Heads that share entries read them together: all heads of
// multi-head latent attention, the heads of a group in grouped-query attention.
#include "simd.h"

#include <algorithm>
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

constexpr int HEADS = 4;  // at a time

// scores[h][s] for tokens 0..last of `count` <= HEADS queries.
template <typename T>
void score(const T* query, const T* keys, float* scores, int64_t count, int64_t W, int64_t stride, int64_t last, int64_t row) {
  for (int64_t s = 0; s <= last; s++) {
    vf total[HEADS] = {};
    for (int64_t c = 0; c < W; c += LANES) {
      const vf key = load_some(keys + s * stride + c, W - c);
      for (int h = 0; h < HEADS; h++) total[h] += load_some(query + std::min<int64_t>(h, count - 1) * W + c, W - c) * key;
    }
    for (int h = 0; h < count; h++) scores[h * row + s] = sum(total[h]);
  }
}

void softmax(float* scores, int64_t last, float scale) {
  float best = scores[0];
  for (int64_t s = 1; s <= last; s++) best = std::max(best, scores[s]);
  vf total{};
  for (int64_t s = 0; s <= last; s += LANES) {
    const vf p = exp_of((load_some(scores + s, last + 1 - s) - best) * scale);
    store_some(scores + s, p, last + 1 - s);
    total += load_some(scores + s, last + 1 - s);
  }
  const float inverse = 1 / sum(total);
  for (int64_t s = 0; s <= last; s++) scores[s] *= inverse;
}

template <typename T>
void mix(const float* probs, const T* values, T* out, int64_t count, int64_t V, int64_t stride, int64_t last, int64_t row) {
  for (int64_t c = 0; c < V; c += 4 * LANES) {
    const int64_t vectors = std::min<int64_t>(4, (V - c + LANES - 1) / LANES);
    vf total[HEADS][4] = {};
    for (int64_t s = 0; s <= last; s++)
      for (int64_t j = 0; j < vectors; j++) {
        const vf value = load_some(values + s * stride + c + j * LANES, V - c - j * LANES);
        for (int h = 0; h < HEADS; h++) total[h][j] += probs[std::min<int64_t>(h, count - 1) * row + s] * value;
      }
    for (int64_t h = 0; h < count; h++)
      for (int64_t j = 0; j < vectors; j++) store_some(out + h * V + c + j * LANES, total[h][j], V - c - j * LANES);
  }
}

template <typename T>
void run(const Decode& a) {
  const int64_t row = round_up(a.longest);
#pragma omp parallel num_threads(a.threads)
  {
    std::unique_ptr<float[]> scores(new float[HEADS * row]);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.B * a.G; i++) {
      const int64_t b = i / a.G, g = i % a.G;
      const T* entries = static_cast<const T*>(a.entries) + b * a.entries_b;
      for (int64_t h = 0; h < a.Q; h += HEADS) {
        const int64_t count = std::min<int64_t>(HEADS, a.Q - h), at = i * a.Q + h;
        score(static_cast<const T*>(a.query) + at * a.W, entries + g * a.key_g, scores.get(), count, a.W, a.entries_s, a.last[b], row);
        for (int64_t j = 0; j < count; j++) softmax(scores.get() + j * row, a.last[b], float(a.scale));
        mix(scores.get(), entries + a.value_at + g * a.value_g, static_cast<T*>(a.out) + at * a.V, count, a.V, a.entries_s, a.last[b], row);
      }
    }
  }
}

}  // namespace

extern "C" void decode(const Decode* a, int64_t is_bf16) { is_bf16 ? run<bf16>(*a) : run<float>(*a); }
