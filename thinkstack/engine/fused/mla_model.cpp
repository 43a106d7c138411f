// Inference on small models with latent attention in one call, in fp32: single calls would take longer than the arithmetic.
// A thread computes up to 64 tokens at a time, stored as (features, tokens), so that weights are read in their layout and
// norms, rotations and activations work on LANES tokens at once.
#include "layout.h"
#include "paged_attention.h"
#include "experts.h"

#include <limits>

// B tokens, D hidden size, H heads, N unrotated and R rotated head width, V value width, C latent width, Q query latent.
struct MLAAttention {
  const float *x, *wq_a, *q_norm, *wq_b, *wkv_a, *kv_norm, *wkv_b, *wo;  // wq_a, q_norm: null without a query latent
  const float* rope;      // (B, R / 2) pairs
  const int64_t* last;    // (B,): the new token's position in its sequence
  const int32_t* block_tables;  // (sequences, table_width): the blocks of each, in order
  const int32_t* seq_index;   // (B,): the sequence of each token
  void* cache;            // (blocks, 2^shift, C + R), in bf16 or float
  float *out, *queries, *attended;  // (B, D); scratch for absorbed queries, (B, H, C + R), and attended latents, (B, H, C)
  int64_t B, D, H, N, R, V, C, Q, shift, table_width, interleaved, threads;
  double scale, eps;
};

namespace {

constexpr int64_t BLOCK_SIZE = 64;  // tokens per thread at a time

// Transpose `count` rows of `width` to (width, n), zeros beyond `count`; and back.
void to_features(const float* rows, int64_t stride, int64_t count, int64_t width, float* out, int64_t n) {
  for (int64_t r = 0; r < n; r += LANES)
    for (int64_t c = 0; c < width; c += LANES) {
      vu block[LANES];
      for (int64_t i = 0; i < LANES; i++) block[i] = r + i < count ? (vu)load_some(rows + (r + i) * stride + c, width - c) : vu{};
      transpose(block);
      for (int64_t i = 0; i < LANES && c + i < width; i++) store(out + (c + i) * n + r, (vf)block[i]);
    }
}
void to_rows(const float* features, int64_t n, int64_t count, int64_t width, float* rows, int64_t stride) {
  for (int64_t r = 0; r < count; r += LANES)
    for (int64_t c = 0; c < width; c += LANES) {
      vu block[LANES];
      for (int64_t i = 0; i < LANES; i++) block[i] = c + i < width ? (vu)load(features + (c + i) * n + r) : vu{};
      transpose(block);
      for (int64_t i = 0; i < LANES && r + i < count; i++) store_some(rows + (r + i) * stride + c, (vf)block[i], width - c);
    }
}

// y (M, n) = weight (M, K) x (K, n).
void linear(const float* weight, const float* x, float* y, int64_t M, int64_t K, int64_t n) {
  multiply<float>({weight, K, 1}, x, n, y, n, M, n, K, false);
}

void norm(float* x, const float* weight, int64_t width, int64_t n, double eps) {
  for (int64_t r = 0; r < n; r += LANES) {
    vf total{};
    for (int64_t c = 0; c < width; c++) total += load(x + c * n + r) * load(x + c * n + r);
    vf scale;
    for (int i = 0; i < LANES; i++) scale[i] = 1 / std::sqrt(total[i] / width + float(eps));
    for (int64_t c = 0; c < width; c++) store(x + c * n + r, load(x + c * n + r) * scale * weight[c]);
  }
}

// table: (R, n), cos and sin of each pair in turn.
void rotate(float* x, const float* table, int64_t R, int64_t n, bool interleaved) {
  const int64_t apart = interleaved ? 1 : R / 2, next = interleaved ? 2 : 1;
  for (int64_t i = 0; i < R / 2; i++)
    for (int64_t r = 0; r < n; r += LANES) {
      float *re = x + i * next * n + r, *im = re + apart * n;
      const vf cos = load(table + 2 * i * n + r), sin = load(table + (2 * i + 1) * n + r), a = load(re), b = load(im);
      store(re, a * cos - b * sin);
      store(im, a * sin + b * cos);
    }
}

template <typename T>  // of the cache
struct TokenBlock {
  const MLAAttention& a;
  const int64_t W, K;
  Scratch scratch;
  float *x, *latent, *q, *table, *entry, *absorbed, *values_scratch;
  static int64_t bytes(const MLAAttention& a) {
    const int64_t W = a.C + a.R, K = a.N + a.R;
    return 4 * BLOCK_SIZE * (2 * a.D + a.Q + a.H * K + a.R + W + a.H * (W + a.C + a.V)) + 8 * Scratch::SLACK;
  }
  explicit TokenBlock(const MLAAttention& a) : a(a), W(a.C + a.R), K(a.N + a.R), scratch(bytes(a)) {
    x = scratch.take<float>(BLOCK_SIZE * a.D);
    latent = scratch.take<float>(BLOCK_SIZE * a.Q);
    q = scratch.take<float>(BLOCK_SIZE * a.H * K);
    table = scratch.take<float>(BLOCK_SIZE * a.R);
    entry = scratch.take<float>(BLOCK_SIZE * W);
    absorbed = scratch.take<float>(BLOCK_SIZE * a.H * W);  // absorbed queries, (H * W, n)
    values_scratch = scratch.take<float>(BLOCK_SIZE * (a.H * (a.C + a.V) + a.D));  // attended latents, (H * C, n), and values
  }

  // Compute queries and cache entries of some tokens, and write the entries to the cache.
  void prepare(int64_t start, int64_t count) {
    const int64_t n = round_up(count);
    to_features(a.x + start * a.D, a.D, count, a.D, x, n);
    to_features(a.rope + start * a.R, a.R, count, a.R, table, n);
    if (a.wq_a) {
      linear(a.wq_a, x, latent, a.Q, a.D, n);
      norm(latent, a.q_norm, a.Q, n, a.eps);
    }
    linear(a.wq_b, a.wq_a ? latent : x, q, a.H * K, a.wq_a ? a.Q : a.D, n);
    linear(a.wkv_a, x, entry, W, a.D, n);
    norm(entry, a.kv_norm, a.C, n, a.eps);
    rotate(entry + a.C * n, table, a.R, n, a.interleaved);
    for (int64_t h = 0; h < a.H; h++) {
      float *own = q + h * K * n, *to = absorbed + h * W * n;
      rotate(own + a.N * n, table, a.R, n, a.interleaved);
      multiply<float>({a.wkv_b + h * (a.N + a.V) * a.C, 1, a.C}, own, n, to, n, a.C, n, a.N, false);
      std::copy(own + a.N * n, own + K * n, to + a.C * n);
    }
    to_rows(absorbed, n, count, a.H * W, a.queries + start * a.H * W, a.H * W);
    to_rows(entry, n, count, W, absorbed, W);
    for (int64_t i = 0; i < count; i++) copy_row(absorbed + i * W, pages(start + i).at(a.last[start + i]), W);
  }

  Pages<T> pages(int64_t b) const { return {static_cast<T*>(a.cache), a.block_tables + a.seq_index[b] * a.table_width, a.shift, W}; }

  void finish(int64_t start, int64_t count) {
    const int64_t n = round_up(count);
    to_features(a.attended + start * a.H * a.C, a.H * a.C, count, a.H * a.C, values_scratch, n);
    float* values = values_scratch + a.H * a.C * n;
    for (int64_t h = 0; h < a.H; h++)
      linear(a.wkv_b + (h * (a.N + a.V) + a.N) * a.C, values_scratch + h * a.C * n, values + h * a.V * n, a.V, a.C, n);
    linear(a.wo, values, x, a.D, a.H * a.V, n);
    to_rows(x, n, count, a.D, a.out + start * a.D, a.D);
  }
};

// Tokens per thread at a time: a multiple of LANES, so that all threads get some.
int64_t share(int64_t tokens, int64_t threads) { return std::min(BLOCK_SIZE, round_up((tokens + threads - 1) / threads)); }

template <typename T>
void mla_attention(const MLAAttention* a, PagedAttentionJob<float, T>& attend) {
  const int64_t size = share(a->B, a->threads);
#pragma omp parallel num_threads(a->threads)
  {
    TokenBlock<T> block(*a);
    ThreadAttention<float, T> attention = attend.attention();
#pragma omp for schedule(static)
    for (int64_t start = 0; start < a->B; start += size) block.prepare(start, std::min(size, a->B - start));
    // after all entries are written: several tokens may be of one sequence, and later ones attend to earlier ones
    attend.work(attention, static_cast<const T*>(a->cache));
#pragma omp for schedule(static)
    for (int64_t start = 0; start < a->B; start += size) block.finish(start, std::min(size, a->B - start));
  }
}

// w2 (silu(w1 x) * (w3 x)) of x (B, D), w1 and w3 (I, D), w2 (D, I).
void feed_forward(const float* rows, const float* w1, const float* w2, const float* w3, float* out, int64_t B, int64_t D, int64_t I,
                  int64_t threads) {
  const int64_t size = share(B, threads);
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(4 * BLOCK_SIZE * (2 * D + 2 * I) + 4 * Scratch::SLACK);
    float *x = scratch.take<float>(BLOCK_SIZE * D), *gate = scratch.take<float>(BLOCK_SIZE * I), *up = scratch.take<float>(BLOCK_SIZE * I);
    float* y = scratch.take<float>(BLOCK_SIZE * D);
#pragma omp for schedule(static)
    for (int64_t start = 0; start < B; start += size) {
      const int64_t count = std::min(size, B - start), n = round_up(count);
      to_features(rows + start * D, D, count, D, x, n);
      linear(w1, x, gate, I, D, n);
      linear(w3, x, up, I, D, n);
      for (int64_t i = 0; i < I * n; i += LANES) store(gate + i, load(gate + i) * sigmoid(load(gate + i)) * load(up + i));
      linear(w2, gate, y, D, I, n);
      to_rows(y, n, count, D, out + start * D, D);
    }
  }
}

// Group-limited top-k: `top_groups` of `groups`, by the sum of their `scores_per_group` highest affinities, then K of E.
struct RouterConfig {
  int64_t E, K, groups, top_groups, scores_per_group, normalize;
  double factor;
};

// Choose the experts of one token. own: affinities (E,). buffer: E + groups floats. Ties go to the lower index.
void choose_experts(const RouterConfig& a, const float* own, const float* bias, float* weights, int64_t* experts, float* buffer) {
  const float NEG_INF = -std::numeric_limits<float>::infinity();
  const int64_t size = a.E / a.groups;
  float* group_score = buffer + a.E;
  for (int64_t e = 0; e < a.E; e++) buffer[e] = own[e] + bias[e];
  for (int64_t g = 0; g < a.groups && a.top_groups < a.groups; g++) {
    float first = NEG_INF, second = NEG_INF;
    for (int64_t e = g * size; e < (g + 1) * size; e++)
      if (buffer[e] > first) second = first, first = buffer[e];
      else second = std::max(second, buffer[e]);
    group_score[g] = a.scores_per_group == 2 ? first + second : first;
  }
  for (int64_t dropped = a.top_groups; dropped < a.groups; dropped++) {  // drop the lowest group; of equals the last one
    int64_t worst = -1;
    for (int64_t g = 0; g < a.groups; g++)
      if (group_score[g] != INFINITY && (worst < 0 || group_score[g] <= group_score[worst])) worst = g;
    group_score[worst] = INFINITY;
    std::fill(buffer + worst * size, buffer + (worst + 1) * size, NEG_INF);
  }
  float total = 0;
  for (int64_t k = 0; k < a.K; k++) {
    const int64_t top = std::max_element(buffer, buffer + a.E) - buffer;
    experts[k] = top;
    total += weights[k] = own[top];
    buffer[top] = NEG_INF;
  }
  const float scale = a.normalize ? float(a.factor) / (total + 1e-20f) : float(a.factor);
  for (int64_t k = 0; k < a.K; k++) weights[k] *= scale;
}

}  // namespace

// Group-limited top-k of each token. scores: (B, E); bias: (E,). Returns weights (B, K) and experts (B, K).
extern "C" void route(const float* scores, const float* bias, float* weights, int64_t* experts, int64_t B, int64_t E, int64_t K, int64_t groups,
                      int64_t top_groups, int64_t scores_per_group, int64_t normalize, double factor, int64_t threads) {
  const RouterConfig router{E, K, groups, top_groups, scores_per_group, normalize, factor};
#pragma omp parallel num_threads(threads)
  {
    const Buffer<float> buffer = make_buffer<float>(E + groups);
#pragma omp for
    for (int64_t b = 0; b < B; b++) choose_experts(router, scores + b * E, bias, weights + b * K, experts + b * K, buffer.get());
  }
}

// A layer of a small model with latent attention.
struct MLALayer {
  const float *attention_norm, *wq_a, *q_norm, *wq_b, *wkv_a, *kv_norm, *wkv_b, *wo, *ffn_norm;  // as in MLAAttention
  const float *w1, *w2, *w3;                  // dense feed-forward, or shared experts; null if there are none
  const float *router, *bias, *w_in, *w_out;  // (E, D), (E,), as in Experts; null in a dense layer
  int64_t I;                                  // intermediate size of w1
};

// B tokens, L layers, E experts of size J, K per token; other sizes as in MLAAttention and `route`.
struct MLAPass {
  const MLALayer* layers;
  const float* rope;
  const int64_t* last;
  const int32_t *block_tables, *seq_index;
  float* x;          // (B, D), changed in place
  void* cache;       // (L, cache blocks, 2^shift, C + R), in bf16 or float
  int64_t* experts;  // (layers with experts, B, K): the chosen ones
  int64_t L, B, D, H, N, R, V, C, Q, E, J, K, groups, top_groups, scores_per_group, normalize, softmax;
  int64_t shift, table_width, layer_stride, interleaved, threads;
  double scale, eps, factor;
};

// rows.cpp
extern "C" void rms_norm_fp32(const void* x, const float* weight, void* y, float* inverse, int64_t N, int64_t D, int64_t stride, double eps,
                              int64_t threads);
extern "C" void add_norm_fp32(void* x, const void* first, const void* second, const float* weight, void* y, int64_t N, int64_t D, double eps,
                              int64_t threads);

namespace {

// Chosen experts and their weights, (B, K), of normed rows (B, D).
void route_rows(const MLAPass& a, const MLALayer& w, const float* rows, float* weights, int64_t* experts) {
  const int64_t size = share(a.B, a.threads);
  const RouterConfig router{a.E, a.K, a.groups, a.top_groups, a.scores_per_group, a.normalize, a.factor};
#pragma omp parallel num_threads(a.threads)
  {
    Scratch scratch(4 * (BLOCK_SIZE * (a.D + 2 * a.E) + a.E + a.groups) + 4 * Scratch::SLACK);
    float *x = scratch.take<float>(BLOCK_SIZE * a.D), *y = scratch.take<float>(BLOCK_SIZE * a.E), *scores = scratch.take<float>(BLOCK_SIZE * a.E);
    float* buffer = scratch.take<float>(a.E + a.groups);
#pragma omp for schedule(static)
    for (int64_t start = 0; start < a.B; start += size) {
      const int64_t count = std::min(size, a.B - start), n = round_up(count);
      to_features(rows + start * a.D, a.D, count, a.D, x, n);
      linear(w.router, x, y, a.E, a.D, n);
      for (int64_t r = 0; r < n; r += LANES) {
        vf top = splat(a.softmax ? -INFINITY : 0.0f), total = splat(a.softmax ? 0.0f : 1.0f);
        for (int64_t e = 0; a.softmax && e < a.E; e++) top = larger(load(y + e * n + r), top);
        for (int64_t e = 0; e < a.E; e++) {
          const vf score = load(y + e * n + r);
          store(y + e * n + r, a.softmax ? exp_of(score - top) : sigmoid(score));
          if (a.softmax) total += load(y + e * n + r);
        }
        for (int64_t e = 0; a.softmax && e < a.E; e++) store(y + e * n + r, load(y + e * n + r) / total);
      }
      to_rows(y, n, count, a.E, scores, a.E);
      for (int64_t i = 0; i < count; i++)
        choose_experts(router, scores + i * a.E, w.bias, weights + (start + i) * a.K, experts + (start + i) * a.K, buffer);
    }
  }
}

template <typename T>  // of the cache
void run(const MLAPass& a) {
  const auto normed = make_buffer<float>(a.B * a.D), change = make_buffer<float>(a.B * a.D), shared = make_buffer<float>(a.B * a.D);
  const int64_t W = a.C + a.R;
  const auto queries = make_buffer<float>(a.B * a.H * W), attended = make_buffer<float>(a.B * a.H * a.C);
  PagedAttention read{queries.get(), a.cache, a.block_tables, a.seq_index, a.last, attended.get(), a.B, 1, a.H, W, a.C, a.shift, a.table_width, W};
  read.threads = a.threads, read.scale = a.scale;
  PagedAttentionJob<float, T> attend(read);
  const auto weights = make_buffer<float>(a.B * a.K), picked = make_buffer<float>(a.B * a.K * a.D);
  int64_t* chosen = a.experts;
  const auto add = [&](const float* first, const float* second, const float* weight) {
    add_norm_fp32(a.x, first, second, weight, normed.get(), a.B, a.D, a.eps, a.threads);
  };
  rms_norm_fp32(a.x, a.layers[0].attention_norm, normed.get(), nullptr, a.B, a.D, a.D, a.eps, a.threads);
  for (int64_t l = 0; l < a.L; l++) {
    const MLALayer& w = a.layers[l];
    const float* following = l + 1 < a.L ? a.layers[l + 1].attention_norm : nullptr;
    const MLAAttention step{normed.get(), w.wq_a, w.q_norm, w.wq_b, w.wkv_a, w.kv_norm, w.wkv_b, w.wo, a.rope, a.last, a.block_tables, a.seq_index,
                          static_cast<T*>(a.cache) + l * a.layer_stride, change.get(), queries.get(), attended.get(), a.B, a.D, a.H, a.N, a.R, a.V, a.C,
                          a.Q, a.shift, a.table_width, a.interleaved, a.threads, a.scale, a.eps};
    mla_attention<T>(&step, attend);
    add(change.get(), nullptr, w.ffn_norm);
    if (w.w1) feed_forward(normed.get(), w.w1, w.w2, w.w3, shared.get(), a.B, a.D, w.I, a.threads);
    if (w.router) {
      route_rows(a, w, normed.get(), weights.get(), chosen);
      Experts routed{};
      routed.x = normed.get(), routed.weights = weights.get(), routed.experts = chosen, routed.w_in = w.w_in, routed.w_out = w.w_out;
      routed.out = change.get(), routed.picked = picked.get();
      routed.N = a.B, routed.K = a.K, routed.E = a.E, routed.D = a.D, routed.I = a.J, routed.threads = a.threads;
      experts(&routed, 0, 0);
      add(change.get(), w.w1 ? shared.get() : nullptr, following);
      chosen += a.B * a.K;
    } else {
      add(shared.get(), nullptr, following);
    }
  }
}

}  // namespace

extern "C" void mla_pass(const MLAPass* a, int64_t is_bf16) { is_bf16 ? run<bf16>(*a) : run<float>(*a); }

LAYOUT(MLALayer, MLALayer,
       FIELD(attention_norm) FIELD(wq_a) FIELD(q_norm) FIELD(wq_b) FIELD(wkv_a) FIELD(kv_norm) FIELD(wkv_b) FIELD(wo)
       FIELD(ffn_norm) FIELD(w1) FIELD(w2) FIELD(w3) FIELD(router) FIELD(bias) FIELD(w_in) FIELD(w_out) FIELD(I))

LAYOUT(MLAPass, MLAPass,
       FIELD(layers) FIELD(rope) FIELD(last) FIELD(block_tables) FIELD(seq_index) FIELD(x) FIELD(cache) FIELD(experts)
       FIELD(L) FIELD(B) FIELD(D) FIELD(H) FIELD(N) FIELD(R) FIELD(V) FIELD(C) FIELD(Q) FIELD(E) FIELD(J) FIELD(K)
       FIELD(groups) FIELD(top_groups) FIELD(scores_per_group) FIELD(normalize) FIELD(softmax) FIELD(shift)
       FIELD(table_width) FIELD(layer_stride) FIELD(interleaved) FIELD(threads) FIELD(scale) FIELD(eps) FIELD(factor))
