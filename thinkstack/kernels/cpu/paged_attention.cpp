// Attention of new tokens over their sequences' cached contexts. Heads that share entries are computed together: all heads of
// multi-head latent attention, the heads of a group in grouped-query attention. So are the tokens of a prompt.
#include "layout.h"
#include "paged_attention.h"

// Projected queries, keys and values of N new tokens in grouped-query attention.
struct AttendGQA {
  const void* qkv;                 // (N, (H + 2 G) W): heads of queries, keys, values
  const float *q_norm, *k_norm;    // (W,), or null
  const float* rope;               // (N, W / 2) pairs
  const int64_t* last;             // (N,): the token's position in its sequence
  const int32_t *block_tables, *seq_index;   // as in PagedAttention
  void *query, *entries, *out;     // (N, H, W), scratch; (blocks, 2^shift, 2 G W): keys, then values; (N, H, W)
  int64_t N, H, G, W, shift, table_width, interleaved, threads;
  double scale, eps;
};

namespace {

template <typename T>
void run(const PagedAttention& a) {
  PagedAttentionJob<T, T> attend(a);
#pragma omp parallel num_threads(a.threads)
  {
    ThreadAttention<T, T> attention = attend.attention();
    attend.work(attention, static_cast<const T*>(a.entries));
  }
}

template <typename T>
void run_new(const AttendGQA& a) {
  const int64_t W = a.W, heads = a.H + 2 * a.G, width = 2 * a.G * W;
  const auto qkv = static_cast<const T*>(a.qkv);
  const auto query = static_cast<T*>(a.query), entries = static_cast<T*>(a.entries);
  PagedAttentionJob<T, T> attend(paged_gqa(a, a.N, query, entries, a.out));
#pragma omp parallel num_threads(a.threads)
  {
    std::vector<float> buffer(W);
    ThreadAttention<T, T> attention = attend.attention();
#pragma omp for schedule(static)
    for (int64_t n = 0; n < a.N; n++) {
      const T* head = qkv + n * heads * W;
      T* entry = Pages<T>{entries, a.block_tables + a.seq_index[n] * a.table_width, a.shift, width}.at(a.last[n]);
      for (int64_t h = 0; h < a.H + a.G; h++, head += W) {
        const bool is_key = h >= a.H;
        T* to = is_key ? entry + (h - a.H) * W : query + (n * a.H + h) * W;
        norm_and_rotate_head(head, is_key ? a.k_norm : a.q_norm, a.eps, a.rope + n * W, a.interleaved, to, W, buffer.data());
      }
      std::copy(head, head + a.G * W, entry + a.G * W);
    }
    attend.work(attention, entries);
  }
}

}  // namespace

extern "C" void paged_attention(const PagedAttention* a, int64_t is_bf16) { is_bf16 ? run<bf16>(*a) : run<float>(*a); }

// Writes the entries of the new tokens to the cache, then computes their attention.
extern "C" void attend_gqa(const AttendGQA* a, int64_t is_bf16) { is_bf16 ? run_new<bf16>(*a) : run_new<float>(*a); }

LAYOUT(PagedAttention, PagedAttention,
       FIELD(query) FIELD(entries) FIELD(block_tables) FIELD(seq_index) FIELD(last) FIELD(out) FIELD(N) FIELD(G)
       FIELD(Q) FIELD(W) FIELD(V) FIELD(shift) FIELD(table_width) FIELD(entry_width) FIELD(key_g) FIELD(value_g)
       FIELD(value_at) FIELD(threads) FIELD(scale))

LAYOUT(AttendGQA, AttendGQA,
       FIELD(qkv) FIELD(q_norm) FIELD(k_norm) FIELD(rope) FIELD(last) FIELD(block_tables) FIELD(seq_index) FIELD(query)
       FIELD(entries) FIELD(out) FIELD(N) FIELD(H) FIELD(G) FIELD(W) FIELD(shift) FIELD(table_width) FIELD(interleaved)
       FIELD(threads) FIELD(scale) FIELD(eps))
