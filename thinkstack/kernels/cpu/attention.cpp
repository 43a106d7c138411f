// Causal self-attention of packed rows, forward and backward, after FlashAttention (arXiv:2205.14135): scores stay in the
// cache, keys outside a document are skipped, rotary embedding is applied to the inputs and reverted in their gradients.
// A key may have a part per head and a rotated part that all heads share (multi-head latent attention).
#include "layout.h"
#include "matmul.h"

#include <algorithm>

// B rows, T tokens, H query heads, G key/value heads, D key width, R rotated width (its last part), V value width.
// Strides are in elements: _t from token to token (a row of the batch spans T of them), _h from head to head.
struct Attention {
  const void *q, *k, *k_shared, *v;  // k_shared: (B, T, R) or null; then k holds all D
  const float* rope;                 // (rope_rows, T, R / 2) pairs of cos and sin times amplitude
  const int32_t* kv_range;              // (kv_range_rows, T, 3): the first token that each token attends to, and a hidden interval
  void* out;                         // (B, T, H, V)
  float* log_sum;                    // (B, H, T): log of the sum of exponentiated scores
  const void* grad;                  // (B, T, H, V)
  void *grad_q, *grad_k, *grad_v;    // strides as q, k, v
  float* grad_k_shared;              // (B, G, T, R), one part per head
  int64_t B, T, H, G, D, R, V;
  int64_t q_t, q_h, k_t, k_h, shared_t, v_t, v_h;
  int64_t rope_rows, kv_range_rows, interleaved, threads;
  double scale;
};

namespace {

constexpr int64_t BLOCK = 24;  // queries at a time; few, so that few masked scores are computed

const float* rope_at(const Attention& a, int64_t b, int64_t t) {
  return a.rope + ((a.rope_rows == 1 ? 0 : b) * a.T + t) * a.R;
}

constexpr int64_t PREFETCH_TOKENS = 12;  // the hardware does not prefetch heads, which have a stride between tokens

// One head of one token as input of the product: own part, shared part, rotated, zeros up to a multiple of LANES.
template <typename T>
void gather_head(const Attention& a, const T* own, const T* shared, const float* table, T* out) {
  float row[4096];
  const int64_t width = shared ? a.D - a.R : a.D;
  for (int64_t c = 0; c < width; c += LANES) store(row + c, load_some(own + c, width - c));
  if (shared)
    for (int64_t c = 0; c < a.R; c += LANES) store_some(row + width + c, load_some(shared + c, a.R - c), a.R - c);
  rotate_pairs(row + a.D - a.R, table, a.R, a.interleaved, 1);
  for (int64_t c = a.D; c < round_up(a.D); c++) row[c] = 0;
  for (int64_t c = 0; c < a.D; c += LANES) store(out + c, load(row + c));
}

template <typename T>
struct Task {  // one key/value head of one row of the batch
  using F = Format<T>;
  using U = typename F::Unit;
  const Attention& a;
  const int64_t T_, D_, V_;  // rounded up to whole vectors
  Scratch scratch;
  T *keys, *queries, *grads;     // (T_, D_), (BLOCK, D_), (BLOCK, V_)
  U *keys_by_width, *values, *keys_by_token, *values_by_width, *query_steps, *grad_steps;
  float *scores, *grad_scores, *result;  // (BLOCK, T_), (BLOCK, T_), (BLOCK, max(D_, V_))
  T *probs;                          // (BLOCK, T_): probabilities, or gradients of scores
  U *prob_steps, *grad_score_steps;      // the same, steps along the queries
  float *grad_keys, *grad_values;    // (T_, D_), (T_, V_)

  static int64_t bytes(int64_t T_, int64_t D_, int64_t V_) {
    const int64_t floats = T_ * (4 * D_ + 4 * V_) + BLOCK * (4 * T_ + 4 * D_ + 4 * V_ + T_);
    return 4 * floats + 20 * Scratch::SLACK;
  }
  explicit Task(const Attention& a)
      : a(a), T_(round_up(a.T)), D_(round_up(a.D)), V_(round_up(a.V)), scratch(bytes(T_, D_, V_)) {
    keys = scratch.take<T>(T_ * D_);
    queries = scratch.take<T>(BLOCK * D_);
    grads = scratch.take<T>(BLOCK * V_);
    keys_by_width = scratch.take<U>(T_ * D_ / F::STEP);
    keys_by_token = scratch.take<U>(T_ * D_ / F::STEP);
    values = scratch.take<U>(T_ * V_ / F::STEP);
    values_by_width = scratch.take<U>(T_ * V_ / F::STEP);
    query_steps = scratch.take<U>(BLOCK * D_ / F::STEP);
    grad_steps = scratch.take<U>(BLOCK * V_ / F::STEP);
    scores = scratch.take<float>(BLOCK * T_);
    grad_scores = scratch.take<float>(BLOCK * T_);
    result = scratch.take<float>(BLOCK * std::max(D_, V_));
    probs = scratch.take<T>(BLOCK * T_);
    prob_steps = scratch.take<U>(BLOCK * T_ / F::STEP);
    grad_score_steps = scratch.take<U>(BLOCK * T_ / F::STEP);
    grad_keys = scratch.take<float>(T_ * D_);
    grad_values = scratch.take<float>(T_ * V_);
  }

  const T* query(const void* of, int64_t b, int64_t t, int64_t h) const {
    return static_cast<const T*>(of) + (b * a.T + t) * a.q_t + h * a.q_h;
  }
  const T* output(const void* of, int64_t b, int64_t t, int64_t h) const {
    return static_cast<const T*>(of) + ((b * a.T + t) * a.H + h) * a.V;
  }
  struct KVRange {  // a token attends to tokens [first, itself] without [from, to)
    int64_t first, from, to;
  };
  KVRange kv_range_of(int64_t b, int64_t t) const {
    const int32_t* at = a.kv_range + 3 * ((a.kv_range_rows == 1 ? 0 : b) * a.T + t);
    return {at[0], at[1], at[2]};
  }
  const U* units(const T* rows) const { return reinterpret_cast<const U*>(rows); }

  void gather_keys(int64_t b, int64_t g) {
    for (int64_t t = 0; t < a.T; t++) {
      const int64_t at = b * a.T + t;
      const T* shared = a.k_shared ? static_cast<const T*>(a.k_shared) + at * a.shared_t : nullptr;
      const T *own = static_cast<const T*>(a.k) + at * a.k_t + g * a.k_h, *value = static_cast<const T*>(a.v) + at * a.v_t + g * a.v_h;
      if (t + PREFETCH_TOKENS < a.T) {
        prefetch(own + PREFETCH_TOKENS * a.k_t, a.k_shared ? a.D - a.R : a.D);
        prefetch(value + PREFETCH_TOKENS * a.v_t, a.V);
        if (shared) prefetch(shared + PREFETCH_TOKENS * a.shared_t, a.R);
      }
      gather_head(a, own, shared, rope_at(a, b, t), keys + t * D_);
    }
    std::memset(static_cast<void*>(keys + a.T * D_), 0, (T_ - a.T) * D_ * sizeof(T));
    pack_transposed(units(keys), D_ / F::STEP, keys_by_width, T_, D_ / F::STEP);
  }
  Rows<T> value_rows(int64_t b, int64_t g) const {
    return {static_cast<const T*>(a.v) + b * a.T * a.v_t + g * a.v_h, a.v_t, a.T, a.V};
  }

  // Block [start, start + count) attends to tokens in [low, hole) and [back, high), all multiples of LANES.
  struct Span {
    int64_t b, h, start, count, low, hole, back, high;
    // Calls use(columns before, columns) for the two parts, columns counted from low.
    template <typename Use>
    void parts(Use use) const {
      use(0, hole - low);
      if (back < high) use(back - low, high - back);
    }
    // The first column from c on that is not in the hole.
    int64_t over_hole(int64_t c) const { return c >= hole - low && c < back - low ? back - low : c; }
  };
  Span span_of(int64_t b, int64_t h, int64_t start) const {
    const int64_t count = std::min(BLOCK, a.T - start), high = round_up(start + count);
    int64_t low = start, hole = 0, back = high;
    for (int64_t i = 0; i < count; i++) {
      const KVRange kv_range = kv_range_of(b, start + i);
      low = std::min(low, kv_range.first);
      hole = std::max(hole, kv_range.from);
      back = std::min(back, kv_range.to);
    }
    low = low / LANES * LANES;
    hole = std::max(round_up(hole), low);
    back = back / LANES * LANES;
    if (back <= hole) hole = back = high;
    return {b, h, start, count, low, hole, back, high};
  }
  void score(const Span& s, bool backward) {
    for (int64_t i = 0; i < s.count; i++) {
      if (s.start + i + PREFETCH_TOKENS < a.T) prefetch(query(a.q, s.b, s.start + i + PREFETCH_TOKENS, s.h), a.D);
      if (backward) {  // read right after
        prefetch(output(a.grad, s.b, s.start + i, s.h), a.V);
        prefetch(output(a.out, s.b, s.start + i, s.h), a.V);
      }
      gather_head(a, query(a.q, s.b, s.start + i, s.h), static_cast<const T*>(nullptr), rope_at(a, s.b, s.start + i), queries + i * D_);
    }
    by_columns({units(queries), D_ / F::STEP, 1}, keys_by_width, scores, s, D_ / F::STEP);
  }
  // Products of the block's rows with the tokens of its span: out (BLOCK, columns), tokens (steps, T_).
  void by_columns(Operand<U> rows, const U* tokens, float* out, const Span& s, int64_t steps) {
    s.parts([&](int64_t c, int64_t n) { multiply<U>(rows, tokens + s.low + c, T_, out + c, T_, s.count, n, steps, false); });
  }
  // Sums over the tokens of the block's span, into result: probs times tokens (T_, width).
  void over_columns(const U* tokens, int64_t width, const Span& s) {
    s.parts([&](int64_t c, int64_t n) {
      multiply<U>({units(probs) + c / F::STEP, T_ / F::STEP, 1}, tokens + (s.low + c) / F::STEP * width, width, result, width, s.count, width, n / F::STEP, c > 0);
    });
  }
  // x where query `i` of the block attends to the tokens of the vector at column c, else `other`.
  static vf masked(const Span& s, int64_t i, const KVRange& kv_range, int64_t c, vf x, float other) {
    const int64_t token = s.low + c, last = s.start + i;
    const bool is_not_hidden = token + LANES <= kv_range.from || token >= kv_range.to;
    if (token >= kv_range.first && token + LANES <= last + 1 && is_not_hidden) return x;
    const vi tokens = iota() + int32_t(token);
    const vi attended = (tokens >= int32_t(kv_range.first)) & (tokens <= int32_t(last));
    return attended & ((tokens < int32_t(kv_range.from)) | (tokens >= int32_t(kv_range.to))) ? x : splat(other);
  }
  // Columns that query `i` attends to, rounded outwards to multiples of LANES.
  static int64_t from(const Span& s, int64_t first) { return s.over_hole(first / LANES * LANES - s.low); }
  static int64_t to(const Span& s, int64_t i) { return round_up(s.start + i + 1) - s.low; }

  // Exponentiated scores of row i; returns the inverse of their sum.
  float softmax(const Span& s, int64_t i) {
    const float* row = scores + i * T_;
    const KVRange kv_range = kv_range_of(s.b, s.start + i);
    const int64_t begin = from(s, kv_range.first), end = to(s, i);
    vf top = splat(-INFINITY), total{};
    for (int64_t c = begin; c < end; c = s.over_hole(c + LANES)) top = larger(masked(s, i, kv_range, c, load(row + c), -INFINITY), top);
    const float scale = float(a.scale), best = largest(top) * scale;
    T* out = probs + i * T_;
    for (int64_t c = 0; c < begin; c += LANES) store(out + c, vf{});
    for (int64_t c = begin; c < end; c = s.over_hole(c + LANES)) {
      const vf p = masked(s, i, kv_range, c, exp_of(load(row + c) * scale - best), 0);
      total += p;
      store(out + c, p);
    }
    for (int64_t c = end; c < s.high - s.low; c += LANES) store(out + c, vf{});
    const float sum_exp = sum(total);
    a.log_sum[(s.b * a.H + s.h) * a.T + s.start + i] = best + std::log(sum_exp);
    return 1 / sum_exp;
  }

  void forward(int64_t b, int64_t g) {
    gather_keys(b, g);
    pack_rows(value_rows(b, g), values, T_, V_);
    for (int64_t h = g * (a.H / a.G); h < (g + 1) * (a.H / a.G); h++)
      for (int64_t start = 0; start < a.T; start += BLOCK) {
        const Span s = span_of(b, h, start);
        score(s, false);
        float inverse[BLOCK];
        for (int64_t i = 0; i < s.count; i++) inverse[i] = softmax(s, i);
        over_columns(values, V_, s);
        for (int64_t i = 0; i < s.count; i++) {
          T* out = const_cast<T*>(output(a.out, b, start + i, h));
          for (int64_t c = 0; c < a.V; c += LANES) store_some(out + c, load(result + i * V_ + c) * inverse[i], a.V - c);
        }
      }
  }

  // The values per row that the gradients of its scores need besides the products.
  struct Row {
    int64_t i;
    KVRange kv_range;
    int64_t begin, end;
    float shift, mean;
  };
  Row row_of(const Span& s, int64_t i) const {
    if (i >= s.count) return {i, {0, 0, 0}, 0, 0, 0, 0};  // the missing half of a pair
    const T* out = output(a.out, s.b, s.start + i, s.h);
    vf inner{};
    for (int64_t c = 0; c < a.V; c += LANES) inner += load_some(out + c, a.V - c) * load(grads + i * V_ + c);
    const KVRange kv_range = kv_range_of(s.b, s.start + i);
    return {i, kv_range, from(s, kv_range.first), to(s, i), a.log_sum[(s.b * a.H + s.h) * a.T + s.start + i], sum(inner)};
  }
  // Probability and gradient of the score, for the vector at column c of a row.
  void score_gradient(const Span& s, const Row& r, int64_t c, vf& p, vf& grad_score) const {
    p = grad_score = vf{};
    if (c < r.begin || c >= r.end) return;
    const float scale = float(a.scale);
    p = masked(s, r.i, r.kv_range, c, exp_of(load(scores + r.i * T_ + c) * scale - r.shift), 0);
    grad_score = masked(s, r.i, r.kv_range, c, p * (load(grad_scores + r.i * T_ + c) - r.mean) * scale, 0);
  }
  // Rows i and i + 1: gradients of the scores by row; these and the probabilities also as units along the queries.
  void two_rows(const Span& s, int64_t i) {
    const Row even = row_of(s, i), odd = row_of(s, i + 1);
    for (int64_t c = s.over_hole(0); c < s.high - s.low; c = s.over_hole(c + LANES)) {
      vf p[2], grad_score[2];
      score_gradient(s, even, c, p[0], grad_score[0]);
      score_gradient(s, odd, c, p[1], grad_score[1]);
      store(probs + i * T_ + c, grad_score[0]);
      store(probs + (i + 1) * T_ + c, grad_score[1]);
      put_steps(prob_steps + c, i, p);
      put_steps(grad_score_steps + c, i, grad_score);
    }
  }
  void put_steps(float* steps, int64_t i, const vf x[2]) const {
    store(steps + i * T_, x[0]);
    store(steps + (i + 1) * T_, x[1]);
  }
  void put_steps(uint32_t* steps, int64_t i, const vf x[2]) const { store_units(steps + i / 2 * T_, pair_up(x[0], x[1])); }

  void backward_block(const Span& s) {
    score(s, true);
    for (int64_t i = 0; i < s.count; i++) {
      const T* grad = output(a.grad, s.b, s.start + i, s.h);
      for (int64_t c = 0; c < V_; c += LANES) store(grads + i * V_ + c, c < a.V ? load_some(grad + c, a.V - c) : vf{});
    }
    const int64_t steps = (s.count + F::STEP - 1) / F::STEP;
    pack_rows(Rows<T>{queries, D_, s.count, D_}, query_steps, s.count, D_);
    pack_rows(Rows<T>{grads, V_, s.count, V_}, grad_steps, s.count, V_);
    by_columns({units(grads), V_ / F::STEP, 1}, values_by_width, grad_scores, s, V_ / F::STEP);
    for (int64_t i = 0; i < s.count; i += 2) two_rows(s, i);
    s.parts([&](int64_t c, int64_t n) {
      multiply<U>({prob_steps + c, 1, T_}, grad_steps, V_, grad_values + (s.low + c) * V_, V_, n, V_, steps, true);
      multiply<U>({grad_score_steps + c, 1, T_}, query_steps, D_, grad_keys + (s.low + c) * D_, D_, n, D_, steps, true);
    });
    over_columns(keys_by_token, D_, s);
    for (int64_t i = 0; i < s.count; i++) {
      float* row = result + i * D_;
      rotate_pairs(row + a.D - a.R, rope_at(a, s.b, s.start + i), a.R, a.interleaved, -1);
      T* out = const_cast<T*>(query(a.grad_q, s.b, s.start + i, s.h));
      for (int64_t c = 0; c < a.D; c += LANES) store_some(out + c, load(row + c), a.D - c);
    }
  }

  void backward(int64_t b, int64_t g) {
    gather_keys(b, g);
    pack_rows(Rows<T>{keys, D_, T_, D_}, keys_by_token, T_, D_);
    T* rows = reinterpret_cast<T*>(values);  // (T_, V_), read by the packing below only
    for (int64_t t = 0; t < T_; t++)
      for (int64_t c = 0; c < V_; c += LANES) store(rows + t * V_ + c, value_rows(b, g).at(t, c));
    pack_transposed(units(rows), V_ / F::STEP, values_by_width, T_, V_ / F::STEP);
    std::fill(grad_keys, grad_keys + T_ * D_, 0.0f);
    std::fill(grad_values, grad_values + T_ * V_, 0.0f);
    for (int64_t h = g * (a.H / a.G); h < (g + 1) * (a.H / a.G); h++)
      for (int64_t start = 0; start < a.T; start += BLOCK) backward_block(span_of(b, h, start));
    const int64_t own = a.k_shared ? a.D - a.R : a.D;
    for (int64_t t = 0; t < a.T; t++) {
      const int64_t at = b * a.T + t;
      float *key = grad_keys + t * D_, *value = grad_values + t * V_;
      rotate_pairs(key + a.D - a.R, rope_at(a, b, t), a.R, a.interleaved, -1);
      T* out = static_cast<T*>(a.grad_k) + at * a.k_t + g * a.k_h;
      for (int64_t c = 0; c < own; c += LANES) store_some(out + c, load(key + c), own - c);
      if (a.k_shared) std::copy(key + own, key + a.D, a.grad_k_shared + ((b * a.G + g) * a.T + t) * a.R);
      T* out_v = static_cast<T*>(a.grad_v) + at * a.v_t + g * a.v_h;
      for (int64_t c = 0; c < a.V; c += LANES) store_some(out_v + c, load(value + c), a.V - c);
    }
  }
};

template <typename T>
void run(const Attention& a, bool backward) {
#pragma omp parallel num_threads(a.threads)
  {
    Task<T> task(a);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < a.B * a.G; i++) backward ? task.backward(i / a.G, i % a.G) : task.forward(i / a.G, i % a.G);
  }
}

}  // namespace

extern "C" void attention(const Attention* a, int64_t is_bf16, int64_t backward) {
  is_bf16 ? run<bf16>(*a, backward) : run<float>(*a, backward);
}

LAYOUT(Attention, Attention,
       FIELD(q) FIELD(k) FIELD(k_shared) FIELD(v) FIELD(rope) FIELD(kv_range) FIELD(out) FIELD(log_sum) FIELD(grad)
       FIELD(grad_q) FIELD(grad_k) FIELD(grad_v) FIELD(grad_k_shared) FIELD(B) FIELD(T) FIELD(H) FIELD(G) FIELD(D)
       FIELD(R) FIELD(V) FIELD(q_t) FIELD(q_h) FIELD(k_t) FIELD(k_h) FIELD(shared_t) FIELD(v_t) FIELD(v_h)
       FIELD(rope_rows) FIELD(kv_range_rows) FIELD(interleaved) FIELD(threads) FIELD(scale))
