// Kernels for up to SMALL_M tokens, matrices in bf16.
#include "gqa_blocks.h"

extern "C" void gqa_pass_bf16(const GQAPass* a) { run_gqa_pass<bf16>(*a); }

extern "C" void small_m_linear_bf16(const bf16* x, const bf16* weights, bf16* out, int64_t N, int64_t M, int64_t K, int64_t threads) {
  small_m_linear(Matrix<bf16>{weights, nullptr}, x, out, N, M, K, threads);
}
