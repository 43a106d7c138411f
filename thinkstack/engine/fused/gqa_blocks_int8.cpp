// Kernels for a few tokens, matrices in int8 with a scale (M,) for each row.
#include "gqa_blocks.h"

extern "C" void gqa_pass_int8(const GQAPass* a) { take_steps<int8_t>(*a); }

extern "C" void small_m_linear_int8(const bf16* x, const int8_t* weights, const float* scale, bf16* out, int64_t N, int64_t M, int64_t K, int64_t threads) {
  multiply_few(Matrix<int8_t>{weights, scale}, x, out, N, M, K, threads);
}
