// Products of rows with a matrix in float, and their gradients. The order of sums is fixed, so that an element depends
// neither on the other rows nor on the number of threads.
#include "matmul.h"

namespace {

constexpr int64_t STEPS = 256;  // steps of a sum per panel of B, which stays in the L1 cache
constexpr int64_t ROWS = 96;    // rows of A per panel
constexpr int64_t WIDTH = MOST_VECTORS * LANES;  // columns of a panel

// C (m, n) = A (m, steps) B (steps, n). fill(k, count, c, width, out): rows [k, k + count) of B, columns [c, c + width), to
// out (count, width). bias: (n,), added to each row, or null. Rows are divided among threads.
template <typename Fill>
void product(Operand<float> a, Fill fill, const float* bias, float* c, int64_t m, int64_t n, int64_t steps, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < threads; part++) {
    const int64_t from = m * part / threads, to = m * (part + 1) / threads;
    Scratch scratch(4 * STEPS * n + Scratch::SLACK);
    float* panels = scratch.take<float>(STEPS * n);
    for (int64_t k = 0; from < to && k < steps; k += STEPS) {
      const int64_t count = std::min(STEPS, steps - k);
      for (int64_t j = 0; j < n; j += WIDTH) fill(k, count, j, std::min(WIDTH, n - j), panels + j * count);
      for (int64_t i = from; i < to; i += ROWS) {
        const Operand<float> rows = {a.data + i * a.row + k * a.step, a.row, a.step};
        for (int64_t j = 0; j < n; j += WIDTH) {
          const int64_t width = std::min(WIDTH, n - j);
          multiply<float>(rows, panels + j * count, width, c + i * n + j, n, std::min(ROWS, to - i), width, count, k > 0);
        }
      }
    }
    for (int64_t i = from; bias && i < to; i++)
      for (int64_t j = 0; j < n; j += LANES) store(c + i * n + j, load(c + i * n + j) + load(bias + j));
  }
}

// Rows of B, `stride` apart.
auto as_stored(const float* b, int64_t stride) {
  return [=](int64_t k, int64_t count, int64_t c, int64_t width, float* out) {
    for (int64_t r = 0; r < count; r++)
      for (int64_t j = 0; j < width; j += LANES) store(out + r * width + j, load(b + (k + r) * stride + c + j));
  };
}
// Rows of B from the columns of a matrix with rows `stride` apart.
auto transposed(const float* b, int64_t stride) {
  return [=](int64_t k, int64_t count, int64_t c, int64_t width, float* out) { pack_transposed(b + c * stride + k, stride, out, width, count); };
}

}  // namespace

// y (N, M) = x (N, K) weight (M, K) transposed + bias (M,) or null. M and K are multiples of 16.
extern "C" void linear(const float* x, const float* weight, const float* bias, float* y, int64_t N, int64_t M, int64_t K, int64_t threads) {
  product({x, K, 1}, transposed(weight, K), bias, y, N, M, K, threads);
}

// grad_x (N, K) = grad (N, M) weight (M, K).
extern "C" void linear_grad_x(const float* grad, const float* weight, float* grad_x, int64_t N, int64_t M, int64_t K, int64_t threads) {
  product({grad, M, 1}, as_stored(weight, K), nullptr, grad_x, N, K, M, threads);
}

// grad_weight (M, K) = grad (N, M) transposed x (N, K).
extern "C" void linear_grad_weight(const float* grad, const float* x, float* grad_weight, int64_t N, int64_t M, int64_t K, int64_t threads) {
  product({grad, 1, M}, as_stored(x, K), nullptr, grad_weight, M, K, N, threads);
}
