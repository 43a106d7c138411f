// Routed experts: the SwiGLU of the expert of every (token, choice) pair, forward and backward. Pairs are sorted by expert
// and computed in blocks; a block is stored as (features, pairs), so that weights are read in their layout and only
// activations are transposed.
#include "layout.h"
#include "experts.h"
#include "matmul.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t BLOCK = 64;  // pairs at a time; as EXPERT_BLOCK in operators.py
constexpr int64_t PREFETCH_PAIRS = 8;   // rows of pairs are scattered

struct SortedPairs {  // pairs in the order of their experts, in blocks of one expert each
  struct PairBlock {
    int64_t expert, begin, end;
  };
  std::vector<int64_t> pairs, first_block;  // first_block: (E + 1,)
  std::vector<PairBlock> pair_blocks;
  explicit SortedPairs(const Experts& a) : pairs(a.N * a.K), first_block(a.E + 1) {
    std::vector<int64_t> begin(a.E + 1);
    for (int64_t p = 0; p < a.N * a.K; p++) begin[a.experts[p] + 1]++;
    for (int64_t e = 0; e < a.E; e++) begin[e + 1] += begin[e];
    for (int64_t e = 0; e < a.E; e++) {
      first_block[e] = int64_t(pair_blocks.size());
      for (int64_t at = begin[e]; at < begin[e + 1]; at += BLOCK) pair_blocks.push_back({e, at, std::min(at + BLOCK, begin[e + 1])});
    }
    first_block[a.E] = int64_t(pair_blocks.size());
    for (int64_t p = 0; p < a.N * a.K; p++) pairs[begin[a.experts[p]]++] = p;
  }
};

template <typename T>
struct Worker {
  using F = Format<T>;
  using U = typename F::Unit;
  static constexpr int64_t S = F::STEP;
  const Experts& a;
  const SortedPairs& sorted;
  const int64_t D, I;
  Scratch scratch;
  T *rows, *grad_rows;           // (BLOCK, D): tokens of the block; weighted gradients of its outputs
  U *by_feature, *inner_units;   // (D / S, BLOCK), (max(I, D) / S, BLOCK)
  float* acc;                   // (max(2I, D), BLOCK)
  T *hidden, *inner, *grad_hidden;   // (2I, BLOCK), (I, BLOCK), (max(2I, D), BLOCK)
  U *w_in_steps, *w_out_steps;   // units along the weights' rows: (2I / S, D), (D / S, I)
  U *row_steps, *inner_steps;    // units along the pairs: (BLOCK / S, D), (BLOCK / S, I)
  float *sum_in, *sum_out;       // (2I, D), (D, I)

  static int64_t bytes(int64_t D, int64_t I) {
    return 4 * (BLOCK * (6 * D + 12 * I) + 2 * (2 * I * D + D * I) + BLOCK * (D + 2 * I)) + 20 * Scratch::SLACK;
  }
  Worker(const Experts& a, const SortedPairs& sorted) : a(a), sorted(sorted), D(a.D), I(a.I), scratch(bytes(a.D, a.I)) {
    rows = scratch.take<T>(BLOCK * D);
    grad_rows = scratch.take<T>(BLOCK * D);
    by_feature = scratch.take<U>(D / S * BLOCK);
    inner_units = scratch.take<U>(std::max(I, D) / S * BLOCK);
    acc = scratch.take<float>(std::max(2 * I, D) * BLOCK);
    hidden = scratch.take<T>(2 * I * BLOCK);
    inner = scratch.take<T>(I * BLOCK);
    grad_hidden = scratch.take<T>(std::max(2 * I, D) * BLOCK);
    w_in_steps = scratch.take<U>(2 * I / S * D);
    w_out_steps = scratch.take<U>(D / S * I);
    row_steps = scratch.take<U>(BLOCK / S * D);
    inner_steps = scratch.take<U>(BLOCK / S * I);
    sum_in = scratch.take<float>(2 * I * D);
    sum_out = scratch.take<float>(D * I);
  }
  const U* units(const T* from) const { return reinterpret_cast<const U*>(from); }
  const T* w_in(int64_t e) const { return static_cast<const T*>(a.w_in) + e * 2 * I * D; }
  const T* w_out(int64_t e) const { return static_cast<const T*>(a.w_out) + e * D * I; }

  // Tokens of the block as rows, padded with zeros to a multiple of LANES; returns that number.
  int64_t gather(const SortedPairs::PairBlock& pair_block) {
    const int64_t count = pair_block.end - pair_block.begin, padded = round_up(count);
    const T* x = static_cast<const T*>(a.x);
    for (int64_t i = 0; i < count; i++) {
      const int64_t* pair = &sorted.pairs[pair_block.begin + i];
      if (i + PREFETCH_PAIRS < count) prefetch(x + pair[PREFETCH_PAIRS] / a.K * D, D);
      std::memcpy(static_cast<void*>(rows + i * D), x + *pair / a.K * D, D * sizeof(T));
    }
    std::memset(static_cast<void*>(rows + count * D), 0, (padded - count) * D * sizeof(T));
    return padded;
  }
  void swiglu(const T* both, int64_t padded) {  // (2I, BLOCK) -> inner (I, BLOCK)
    for (int64_t i = 0; i < I; i++)
      for (int64_t c = 0; c < padded; c += LANES) {
        const vf gate = load(both + i * BLOCK + c);
        store(inner + i * BLOCK + c, gate * sigmoid(gate) * load(both + (I + i) * BLOCK + c));
      }
  }
  // Write acc (D, BLOCK) to the rows of its pairs.
  void scatter(const SortedPairs::PairBlock& pair_block, T* to) {
    for (int64_t c = 0; c < pair_block.end - pair_block.begin; c += LANES)
      for (int64_t d = 0; d < D; d += LANES) {
        vu block[LANES];
        for (int i = 0; i < LANES; i++) block[i] = (vu)load(acc + (d + i) * BLOCK + c);
        transpose(block);
        for (int i = 0; i < LANES && c + i < pair_block.end - pair_block.begin; i++) store(to + sorted.pairs[pair_block.begin + c + i] * D + d, (vf)block[i]);
      }
  }
  void cast_rows(const float* from, T* to, int64_t count, int64_t padded) {
    for (int64_t i = 0; i < count; i++)
      for (int64_t c = 0; c < padded; c += LANES) store(to + i * BLOCK + c, load(from + i * BLOCK + c));
  }

  void forward(int64_t index) {
    const SortedPairs::PairBlock& pair_block = sorted.pair_blocks[index];
    const int64_t padded = gather(pair_block);
    pack_transposed(units(rows), D / S, by_feature, padded, D / S);
    multiply<U>({units(w_in(pair_block.expert)), D / S, 1}, by_feature, padded, acc, BLOCK, 2 * I, padded, D / S, false);
    T* both = a.hidden ? static_cast<T*>(a.hidden) + index * 2 * I * BLOCK : hidden;
    cast_rows(acc, both, 2 * I, padded);
    swiglu(both, padded);
    pack_rows(Rows<T>{inner, BLOCK, I, BLOCK}, inner_units, I, padded);
    multiply<U>({units(w_out(pair_block.expert)), I / S, 1}, inner_units, padded, acc, BLOCK, D, padded, I / S, false);
    scatter(pair_block, static_cast<T*>(a.picked));
  }

  void backward(int64_t expert) {
    std::fill(sum_in, sum_in + 2 * I * D, 0.0f);
    std::fill(sum_out, sum_out + D * I, 0.0f);
    pack_rows(Rows<T>{w_in(expert), D, 2 * I, D}, w_in_steps, 2 * I, D);
    pack_rows(Rows<T>{w_out(expert), I, D, I}, w_out_steps, D, I);
    for (int64_t index = sorted.first_block[expert]; index < sorted.first_block[expert + 1]; index++) backward_block(index);
    T *to_in = static_cast<T*>(a.grad_w_in) + expert * 2 * I * D, *to_out = static_cast<T*>(a.grad_w_out) + expert * D * I;
    for (int64_t i = 0; i < 2 * I * D; i += LANES) store(to_in + i, load(sum_in + i));
    for (int64_t i = 0; i < D * I; i += LANES) store(to_out + i, load(sum_out + i));
  }

  // Gradients of the routing weights, and of the outputs of the block as rows.
  void weight_gradients(const SortedPairs::PairBlock& pair_block, int64_t padded) {
    const int64_t count = pair_block.end - pair_block.begin;
    for (int64_t i = 0; i < count; i++) {
      const int64_t pair = sorted.pairs[pair_block.begin + i];
      const T *grads = static_cast<const T*>(a.grad), *picked = static_cast<const T*>(a.picked);
      if (i + PREFETCH_PAIRS < count) {
        const int64_t next = sorted.pairs[pair_block.begin + i + PREFETCH_PAIRS];
        prefetch(grads + next / a.K * D, D);
        prefetch(picked + next * D, D);
      }
      const T *grad = grads + pair / a.K * D, *out = picked + pair * D;
      vf total{};
      for (int64_t d = 0; d < D; d += LANES) {
        const vf g = load(grad + d);
        total += g * load(out + d);
        store(grad_rows + i * D + d, g * a.weights[pair]);
      }
      a.grad_weights[pair] = sum(total);
    }
    std::memset(static_cast<void*>(grad_rows + count * D), 0, (padded - count) * D * sizeof(T));
  }

  void backward_block(int64_t index) {
    const SortedPairs::PairBlock& pair_block = sorted.pair_blocks[index];
    const int64_t padded = gather(pair_block);
    const T* both = static_cast<const T*>(a.hidden) + index * 2 * I * BLOCK;
    swiglu(both, padded);
    weight_gradients(pair_block, padded);
    pack_transposed(units(grad_rows), D / S, by_feature, padded, D / S);  // (D / S, padded)
    multiply<U>({w_out_steps, 1, I}, by_feature, padded, acc, BLOCK, I, padded, D / S, false);  // of inner, (I, BLOCK)
    pack_transposed(units(inner), BLOCK / S, inner_steps, I, padded / S);  // (padded / S, I)
    pack_rows(Rows<T>{grad_rows, D, padded, D}, row_steps, padded, D);
    multiply<U>({row_steps, 1, D}, inner_steps, I, sum_out, I, D, I, padded / S, true);
    for (int64_t i = 0; i < I; i++)
      for (int64_t c = 0; c < padded; c += LANES) {
        const vf d = load(acc + i * BLOCK + c), gate = load(both + i * BLOCK + c), up = load(both + (I + i) * BLOCK + c), s = sigmoid(gate);
        store(grad_hidden + i * BLOCK + c, d * up * s * (1 + gate * (1 - s)));
        store(grad_hidden + (I + i) * BLOCK + c, d * gate * s);
      }
    pack_rows(Rows<T>{rows, D, padded, D}, row_steps, padded, D);
    multiply<U>({units(grad_hidden), BLOCK / S, 1}, row_steps, D, sum_in, D, 2 * I, D, padded / S, true);
    U* grad_hidden_units = pack_grad_hidden(padded);
    multiply<U>({w_in_steps, 1, D}, grad_hidden_units, padded, acc, BLOCK, D, padded, 2 * I / S, false);
    scatter(pair_block, static_cast<T*>(a.grad_pairs));
  }
  U* pack_grad_hidden(int64_t padded) {  // (2I / S, padded), over scratch that is no longer needed
    U* to = reinterpret_cast<U*>(hidden);
    pack_rows(Rows<T>{grad_hidden, BLOCK, 2 * I, BLOCK}, to, 2 * I, padded);
    return to;
  }
};

// out[n] = sum over k of weights[n, k] * pairs[n, k]; weights null: sum of pairs[n, k].
template <typename T>
void combine(const Experts& a, const T* pairs, const float* weights, T* out) {
#pragma omp for schedule(static)
  for (int64_t n = 0; n < a.N; n++)
    for (int64_t d = 0; d < a.D; d += LANES) {
      vf total{};
      for (int64_t k = 0; k < a.K; k++) {
        const vf x = load(pairs + (n * a.K + k) * a.D + d);
        total += weights ? x * weights[n * a.K + k] : x;
      }
      store(out + n * a.D + d, total);
    }
}

template <typename T>
void run(const Experts& a, bool backward) {
  const SortedPairs sorted(a);
#pragma omp parallel num_threads(a.threads)
  {
    Worker<T> worker(a, sorted);
    if (backward) {
#pragma omp for schedule(dynamic)
      for (int64_t e = 0; e < a.E; e++) worker.backward(e);
      combine(a, static_cast<const T*>(a.grad_pairs), nullptr, static_cast<T*>(a.grad_x));
    } else {
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < int64_t(sorted.pair_blocks.size()); i++) worker.forward(i);
      combine(a, static_cast<const T*>(a.picked), a.weights, static_cast<T*>(a.out));
    }
  }
}

}  // namespace

extern "C" void experts(const Experts* a, int64_t is_bf16, int64_t backward) {
  is_bf16 ? run<bf16>(*a, backward) : run<float>(*a, backward);
}

LAYOUT(Experts, Experts,
       FIELD(x) FIELD(weights) FIELD(experts) FIELD(w_in) FIELD(w_out) FIELD(out) FIELD(hidden) FIELD(picked)
       FIELD(grad) FIELD(grad_x) FIELD(grad_pairs) FIELD(grad_w_in) FIELD(grad_w_out) FIELD(grad_weights) FIELD(N)
       FIELD(K) FIELD(E) FIELD(D) FIELD(I) FIELD(threads))
