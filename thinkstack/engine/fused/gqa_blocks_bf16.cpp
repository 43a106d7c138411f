// Kernels for up to SMALL_M tokens, matrices in bf16.
#include "layout.h"
#include "gqa_blocks.h"

extern "C" void gqa_pass_bf16(const GQAPass* a) { run_gqa_pass<bf16>(*a); }

extern "C" void small_m_linear_bf16(const bf16* x, const bf16* weights, bf16* out, int64_t N, int64_t M, int64_t K, int64_t threads) {
  small_m_linear(Matrix<bf16>{weights, nullptr}, x, out, N, M, K, threads);
}

LAYOUT(GQALayer, GQALayer<bf16>,
       FIELD(wq) FIELD(wk) FIELD(wv) FIELD(wo) FIELD(w1) FIELD(w2) FIELD(w3) FIELD(attention_norm) FIELD(ffn_norm)
       FIELD(q_norm) FIELD(k_norm) FIELD(bq) FIELD(bk) FIELD(bv) FIELD(bo) FIELD(sq) FIELD(sk) FIELD(sv) FIELD(so)
       FIELD(s1) FIELD(s2) FIELD(s3))

LAYOUT(GQAPass, GQAPass,
       FIELD(layers) FIELD(rope) FIELD(last) FIELD(block_tables) FIELD(seq_index) FIELD(x) FIELD(cache) FIELD(L)
       FIELD(B) FIELD(D) FIELD(H) FIELD(G) FIELD(W) FIELD(I) FIELD(shift) FIELD(table_width) FIELD(layer_stride)
       FIELD(interleaved) FIELD(threads) FIELD(scale) FIELD(eps))
