// All blocks of a dense model with grouped-query attention for a few new tokens in one call, for decoding with one or a few
// users. Reading every weight once from memory bounds the time; a call per product, or products optimized for many rows,
// would take longer.
#pragma once
#include <memory>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "paged_attention.h"
#include "small_m.h"

// D hidden size, H query heads, G key/value heads, W head width, I intermediate size. Matrices (out, in) of M: bf16, or
// int8 with a scale for each row.
template <typename M>
struct GQALayer {
  const M *wq, *wk, *wv, *wo, *w1, *w2, *w3;
  const float *attention_norm, *ffn_norm, *q_norm, *k_norm, *bq, *bk, *bv, *bo;  // the last six may be null
  const float *sq, *sk, *sv, *so, *s1, *s2, *s3;                                 // scales; null for bf16
};

// B tokens, L layers.
struct GQAPass {
  const void* layers;     // (L,) GQALayer, of the matrix type of the kernel
  const float* rope;      // (B, W / 2) pairs
  const int64_t* last;    // (B,): the new token's position in its sequence
  const int32_t* block_tables;  // (sequences, table_width): the cache's blocks of each, in order
  const int32_t* seq_index;   // (B,): the sequence of each token
  bf16 *x, *cache;        // (B, D), changed in place; (L, cache blocks, 2^shift, 2 G W): keys, then values
  int64_t L, B, D, H, G, W, I, shift, table_width, layer_stride, interleaved, threads;
  double scale, eps;
};

namespace {

constexpr int SMALL_M = 8;  // most tokens

#ifdef _OPENMP
int64_t thread_id() { return omp_get_thread_num(); }
int64_t num_threads() { return omp_get_num_threads(); }
#else
int64_t thread_id() { return 0; }
int64_t num_threads() { return 1; }
#endif

template <int N, typename M>
struct GQAForward {
  const GQAPass& a;
  const int64_t queries, keys;  // widths of all heads
  std::vector<bf16> query, attended, activated;
  std::vector<float> qkv, middle, gate, up;
  PagedAttentionJob<bf16, bf16> attend;

  explicit GQAForward(const GQAPass& a)
      : a(a), queries(a.H * a.W), keys(a.G * a.W), query(N * queries), attended(N * queries), activated(N * a.I),
        qkv(N * (queries + 2 * keys)), middle(N * a.D), gate(N * a.I), up(N * a.I), attend(paged_gqa(a, N, query.data(), a.cache, attended.data())) {}

  Pages<bf16> pages(int64_t layer, int64_t n, int64_t at) const {
    return {a.cache + layer * a.layer_stride + at, a.block_tables + a.seq_index[n] * a.table_width, a.shift, 2 * keys};
  }

  // Rows [from, to) of a product of `count` rows are this thread's.
  struct Share {
    int64_t from, to;
  };
  static Share share(int64_t count) { return {count * thread_id() / num_threads(), count * (thread_id() + 1) / num_threads()}; }

  void project(Matrix<M> weights, const float* bias, const Input<N, M>& normed, int64_t count, int64_t at) {
    const Share own = share(count);
    rows(weights, normed, own.from, own.to, [&](int64_t m, const float* found) {
      for (int n = 0; n < N; n++) qkv[n * (queries + 2 * keys) + at + m] = found[n] + (bias ? bias[m] : 0);
    });
  }

  // Norm and rotate head h of token n, and write it to the queries, or from head H on with its value to the cache.
  void write_head(const GQALayer<M>& w, int64_t layer, int64_t n, int64_t h) {
    float* head = qkv.data() + n * (queries + 2 * keys) + h * a.W;
    const bool is_key = h >= a.H;
    bf16* to = is_key ? pages(layer, n, (h - a.H) * a.W).at(a.last[n]) : query.data() + (n * a.H + h) * a.W;
    norm_and_rotate_head(head, is_key ? w.k_norm : w.q_norm, a.eps, a.rope + n * a.W, a.interleaved, to, a.W, head);
    if (is_key) copy_row(head + keys, to + keys, a.W);
  }

  // The share of one thread in a block; barriers separate its parts.
  void block(const GQALayer<M>& w, int64_t layer, bf16* normed, Input<N, M>& input, ThreadAttention<bf16, bf16>& attention) {
    const Share out = share(a.D), inner = share(a.I);
    for (int n = 0; n < N; n++) norm_row(a.x + n * a.D, w.attention_norm, normed + n * a.D, a.D, a.eps);
    input.take(normed, a.D);
    project({w.wq, w.sq}, w.bq, input, queries, 0);
    project({w.wk, w.sk}, w.bk, input, keys, queries);
    project({w.wv, w.sv}, w.bv, input, keys, queries + keys);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < N * (a.H + a.G); i++) write_head(w, layer, i / (a.H + a.G), i % (a.H + a.G));
    attend.work(attention, a.cache + layer * a.layer_stride);
    input.take(attended.data(), queries);
    rows(Matrix<M>{w.wo, w.so}, input, out.from, out.to, [&](int64_t m, const float* found) {
      for (int n = 0; n < N; n++) middle[n * a.D + m] = to_float(a.x[n * a.D + m]) + found[n] + (w.bo ? w.bo[m] : 0);
    });
#pragma omp barrier
    for (int n = 0; n < N; n++) norm_row(middle.data() + n * a.D, w.ffn_norm, normed + n * a.D, a.D, a.eps);
    input.take(normed, a.D);
    for (int64_t m = inner.from; m < inner.to; m++) {
      float found[2][N];
      input.dots({w.w1, w.s1}, m, found[0]);
      input.dots({w.w3, w.s3}, m, found[1]);
      for (int n = 0; n < N; n++) gate[n * a.I + m] = found[0][n], up[n * a.I + m] = found[1][n];
    }
    for (int n = 0; n < N; n++)
      for (int64_t m = inner.from, left; left = inner.to - m, left > 0; m += LANES) {
        const vf g = load_some(gate.data() + n * a.I + m, left);
        store_some(activated.data() + n * a.I + m, g * sigmoid(g) * load_some(up.data() + n * a.I + m, left), left);
      }
#pragma omp barrier
    input.take(activated.data(), a.I);
    rows(Matrix<M>{w.w2, w.s2}, input, out.from, out.to, [&](int64_t m, const float* found) {
      for (int n = 0; n < N; n++) put(a.x + n * a.D + m, middle[n * a.D + m] + found[n]);
    });
#pragma omp barrier
  }

  void run() {
#pragma omp parallel num_threads(a.threads)
    {
      ThreadAttention<bf16, bf16> attention = attend.attention();
      std::vector<bf16> normed(N * a.D);
      Input<N, M> input(std::max({a.D, queries, a.I}));
      const auto layers = static_cast<const GQALayer<M>*>(a.layers);
      for (int64_t layer = 0; layer < a.L; layer++) block(layers[layer], layer, normed.data(), input, attention);
    }
  }
};

template <int N, typename Work>
void for_count(int64_t count, Work work) {
  if constexpr (N <= SMALL_M) {
    if (count == N) return work(std::integral_constant<int, N>());
    for_count<N + 1>(count, work);
  }
}

template <typename M>
void run_gqa_pass(const GQAPass& a) {
  for_count<1>(a.B, [&](auto n) { GQAForward<n.value, M>(a).run(); });
}

// out (N, width) = x (N, K) weights (width, K) transposed.
template <int N, typename M>
void small_m_linear_rows(Matrix<M> weights, const bf16* x, bf16* out, int64_t width, int64_t K, int64_t threads) {
  Input<N, M> input(K);
  input.take(x, K);
#pragma omp parallel num_threads(threads)
  rows(weights, input, width * thread_id() / num_threads(), width * (thread_id() + 1) / num_threads(), [&](int64_t m, const float* found) {
    for (int i = 0; i < N; i++) put(out + i * width + m, found[i]);
  });
}

// The same for N rows, known at run time. A separate function, because Clang compiles no parallel region within a lambda.
template <typename M>
void small_m_linear(Matrix<M> weights, const bf16* x, bf16* out, int64_t N, int64_t width, int64_t K, int64_t threads) {
  for_count<1>(N, [&](auto n) { small_m_linear_rows<n.value>(weights, x, out, width, K, threads); });
}

}  // namespace
