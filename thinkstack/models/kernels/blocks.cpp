// A few new tokens through all blocks of a dense model with grouped-query attention, in one call: what decoding for one
// or a few users takes. Then every weight is read once, from memory, and that is all that matters; a call for each
// product, and products made for many rows, would take longer than the reading.
#include <memory>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "context.h"

// D hidden size, H query heads, G key/value heads, W head width, I intermediate size. Matrices (out, in).
struct BlockWeights {
  const bf16 *wq, *wk, *wv, *wo, *w1, *w2, *w3;
  const float *attention_norm, *ffn_norm, *q_norm, *k_norm, *bq, *bk, *bv, *bo;  // the last six may be null
};

// B tokens, L layers.
struct BlockSteps {
  const BlockWeights* layers;
  const float* rope;      // (B, W / 2) pairs
  const int64_t* last;    // (B,): the new token's place in its sequence
  const int32_t* tables;  // (sequences, table_width): the cache's blocks of each, in order
  const int32_t* owner;   // (B,): the sequence of each token
  bf16 *x, *cache;        // (B, D), changed in place; (L, cache blocks, 2^shift, 2 G W): keys, then values
  int64_t L, B, D, H, G, W, I, shift, table_width, layer_stride, interleaved, longest, threads;
  double scale, eps;
};

namespace {

constexpr int FEW = 8;  // tokens at most

#ifdef _OPENMP
int64_t thread() { return omp_get_thread_num(); }
int64_t team() { return omp_get_num_threads(); }
#else
int64_t thread() { return 0; }
int64_t team() { return 1; }
#endif

// Sums of one row of weights with N rows of x, (N, K); K a multiple of 32.
template <int N>
void dots(const bf16* weight, const bf16* x, int64_t K, float* out) {
  constexpr int CHAINS = N >= 4 ? 1 : 4 / N;  // additions that do not wait for each other
  constexpr int64_t WIDE = Format<bf16>::WIDE;
  vf sum[N][CHAINS] = {};
  int64_t c = 0;
  for (; c + CHAINS * WIDE <= K; c += CHAINS * WIDE)
    for (int j = 0; j < CHAINS; j++) {
      const auto w = Format<bf16>::load_wide(weight + c + j * WIDE);
      for (int n = 0; n < N; n++) sum[n][j] = multiply_add(sum[n][j], Format<bf16>::load_wide(x + n * K + c + j * WIDE), w);
    }
  for (; c < K; c += WIDE) {
    const auto w = Format<bf16>::load_wide(weight + c);
    for (int n = 0; n < N; n++) sum[n][0] = multiply_add(sum[n][0], Format<bf16>::load_wide(x + n * K + c), w);
  }
  for (int n = 0; n < N; n++) {
    for (int j = 1; j < CHAINS; j++) sum[n][0] += sum[n][j];
    out[n] = ::sum(sum[n][0]);
  }
}

// each(m, sums (N,)) for rows [from, to) of weights (M, K).
template <int N, typename Each>
void rows(const bf16* weights, const bf16* x, int64_t K, int64_t from, int64_t to, Each each) {
  for (int64_t m = from; m < to; m++) {
    float found[N];
    dots<N>(weights + m * K, x, K, found);
    each(m, found);
  }
}

template <int N>
struct Step {
  const BlockSteps& a;
  const int64_t queries, keys;  // widths of all heads
  std::vector<bf16> query, mixed, wide;
  std::vector<float> qkv, middle, gate, up;

  explicit Step(const BlockSteps& a)
      : a(a), queries(a.H * a.W), keys(a.G * a.W), query(N * queries), mixed(N * queries), wide(N * a.I),
        qkv(N * (queries + 2 * keys)), middle(N * a.D), gate(N * a.I), up(N * a.I) {}

  Pages<bf16> pages(int64_t layer, int64_t n, int64_t at) const {
    return {a.cache + layer * a.layer_stride + at, a.tables + a.owner[n] * a.table_width, a.shift, 2 * keys};
  }

  // Rows [from, to) of a product of M rows are this thread's.
  struct Share {
    int64_t from, to;
  };
  static Share share(int64_t M) { return {M * thread() / team(), M * (thread() + 1) / team()}; }

  void project(const bf16* weights, const float* bias, const bf16* normed, int64_t M, int64_t at) {
    const Share own = share(M);
    rows<N>(weights, normed, a.D, own.from, own.to, [&](int64_t m, const float* found) {
      for (int n = 0; n < N; n++) qkv[n * (queries + 2 * keys) + at + m] = found[n] + (bias ? bias[m] : 0);
    });
  }

  // Head h of token n, of the keys from head H on: normed, rotated, to where attention reads it.
  void place_head(const BlockWeights& w, int64_t layer, int64_t n, int64_t h) {
    float* head = qkv.data() + n * (queries + 2 * keys) + h * a.W;
    const bool is_key = h >= a.H;
    const float* weight = is_key ? w.k_norm : w.q_norm;
    bf16* to = is_key ? pages(layer, n, (h - a.H) * a.W).at(a.last[n]) : query.data() + (n * a.H + h) * a.W;
    if (weight) {
      copy(head, to);
      norm_row(to, weight, to, a.W, a.eps);
      copy(to, head);
    }
    turn(head, a.rope + n * a.W, a.W, a.interleaved, 1);
    copy(head, to);
    if (is_key) copy(head + keys, to + keys);
  }
  template <typename From, typename To>
  void copy(const From* from, To* to) const {
    for (int64_t c = 0; c < a.W; c += LANES) store_some(to + c, load_some(from + c, a.W - c), a.W - c);
  }

  void attend(int64_t layer, int64_t n, int64_t g, float* scores) {
    const int64_t per_group = a.H / a.G;
    const auto places = [&](int64_t i) { return Place{n * a.H + g * per_group + i, a.last[n]}; };
    attend_to(query.data(), mixed.data(), per_group, places, pages(layer, n, g * a.W), pages(layer, n, keys + g * a.W), scores, a.W,
              a.W, float(a.scale));
  }

  // What one thread does of a block; all of them meet after each part.
  void block(const BlockWeights& w, int64_t layer, bf16* normed, float* scores) {
    const Share out = share(a.D), inner = share(a.I);
    for (int n = 0; n < N; n++) norm_row(a.x + n * a.D, w.attention_norm, normed + n * a.D, a.D, a.eps);
    project(w.wq, w.bq, normed, queries, 0);
    project(w.wk, w.bk, normed, keys, queries);
    project(w.wv, w.bv, normed, keys, queries + keys);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < N * (a.H + a.G); i++) place_head(w, layer, i / (a.H + a.G), i % (a.H + a.G));
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < N * a.G; i++) attend(layer, i / a.G, i % a.G, scores);
    rows<N>(w.wo, mixed.data(), queries, out.from, out.to, [&](int64_t m, const float* found) {
      for (int n = 0; n < N; n++) middle[n * a.D + m] = to_float(a.x[n * a.D + m]) + found[n] + (w.bo ? w.bo[m] : 0);
    });
#pragma omp barrier
    for (int n = 0; n < N; n++) norm_row(middle.data() + n * a.D, w.ffn_norm, normed + n * a.D, a.D, a.eps);
    for (int64_t m = inner.from; m < inner.to; m++) {
      float found[2][N];
      dots<N>(w.w1 + m * a.D, normed, a.D, found[0]);
      dots<N>(w.w3 + m * a.D, normed, a.D, found[1]);
      for (int n = 0; n < N; n++) gate[n * a.I + m] = found[0][n], up[n * a.I + m] = found[1][n];
    }
    for (int n = 0; n < N; n++)
      for (int64_t m = inner.from, left; left = inner.to - m, left > 0; m += LANES) {
        const vf g = load_some(gate.data() + n * a.I + m, left);
        store_some(wide.data() + n * a.I + m, g * sigmoid(g) * load_some(up.data() + n * a.I + m, left), left);
      }
#pragma omp barrier
    rows<N>(w.w2, wide.data(), a.I, out.from, out.to, [&](int64_t m, const float* found) {
      for (int n = 0; n < N; n++) put(a.x + n * a.D + m, middle[n * a.D + m] + found[n]);
    });
#pragma omp barrier
  }

  void run() {
#pragma omp parallel num_threads(a.threads)
    {
      std::unique_ptr<float[]> scores(new float[QUERIES * round_up(a.longest + 4)]);
      std::vector<bf16> normed(N * a.D);
      for (int64_t layer = 0; layer < a.L; layer++) block(a.layers[layer], layer, normed.data(), scores.get());
    }
  }
};

template <int N, typename Work>
void for_count(int64_t count, Work work) {
  if constexpr (N <= FEW) {
    if (count == N) return work(std::integral_constant<int, N>());
    for_count<N + 1>(count, work);
  }
}

}  // namespace

extern "C" void block_steps(const BlockSteps* a) {
  for_count<1>(a->B, [&](auto n) { Step<n.value>(*a).run(); });
}

// out (N, M) = x (N, K) weights (M, K) transposed, for a few rows.
extern "C" void few_rows(const bf16* x, const bf16* weights, bf16* out, int64_t N, int64_t M, int64_t K, int64_t threads) {
  for_count<1>(N, [&](auto n) {
#pragma omp parallel num_threads(threads)
    rows<n.value>(weights, x, K, M * thread() / team(), M * (thread() + 1) / team(), [&](int64_t m, const float* found) {
      for (int i = 0; i < n.value; i++) put(out + i * M + m, found[i]);
    });
  });
}
