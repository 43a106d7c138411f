// Kernels for up to SMALL_M tokens, matrices in int8 with a scale per row, (M,).
#include "gqa_blocks.h"

extern "C" void gqa_pass_int8(const GQAPass* a) { run_gqa_pass<int8_t>(*a); }

extern "C" void small_m_linear_int8(const bf16* x, const int8_t* weights, const float* scale, bf16* out, int64_t N, int64_t M, int64_t K, int64_t threads) {
  small_m_linear(Matrix<int8_t>{weights, scale}, x, out, N, M, K, threads);
}
