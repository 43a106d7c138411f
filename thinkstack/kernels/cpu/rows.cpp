// Memory-bound operations on rows: each reads its operands once. Sums and exponentials are in float.
#include "simd.h"

#include <algorithm>

// N rows, D width. Rows are contiguous unless a stride is given.
namespace {

template <typename T>
void norm(const T* x, const float* weight, T* y, float* inverse, int64_t N, int64_t D, int64_t stride, double eps, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t n = 0; n < N; n++) {
    const float scale = norm_row(x + n * stride, weight, y + n * D, D, eps);
    if (inverse) inverse[n] = scale;
  }
}

// x += first + second; second may be null. y: the norm of x, unless weight is null.
template <typename T>
void add_norm(T* x, const T* first, const T* second, const float* weight, T* y, int64_t N, int64_t D, double eps, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t n = 0; n < N; n++) {
    T* row = x + n * D;
    for (int64_t c = 0; c < D; c += LANES) {
      vf change = load_some(first + n * D + c, D - c);
      if (second) change += load_some(second + n * D + c, D - c);
      store_some(row + c, load_some(row + c, D - c) + change, D - c);
    }
    if (weight) norm_row(row, weight, y + n * D, D, eps);
  }
}

// grad_weight: (threads, D), a partial sum per thread, zero for a thread without rows.
template <typename T>
void norm_backward(const T* grad, const T* x, const float* weight, const float* inverse, T* grad_x, float* grad_weight, int64_t N,
                   int64_t D, int64_t stride, int64_t threads) {
  std::fill(grad_weight, grad_weight + threads * D, 0.0f);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < threads; part++) {
    float* partial = grad_weight + part * D;
    for (int64_t n = N * part / threads; n < N * (part + 1) / threads; n++) {
      const T *row = x + n * stride, *g = grad + n * D;
      vf total{};
      for (int64_t c = 0; c < D; c += LANES) {
        const vf change = load_some(g + c, D - c) * (load_some(row + c, D - c) * inverse[n]);
        total += change * load_some(weight + c, D - c);
        store_some(partial + c, load_some(partial + c, D - c) + change, D - c);
      }
      const float inner = sum(total) / D;
      for (int64_t c = 0; c < D; c += LANES) {
        const vf normed = load_some(row + c, D - c) * inverse[n];
        const vf wide = load_some(g + c, D - c) * load_some(weight + c, D - c);
        store_some(grad_x + n * D + c, (wide - normed * inner) * inverse[n], D - c);
      }
    }
  }
}

// qweight times the scale of its block of `rows` x `columns`, for M matrices of N rows.
template <typename C, typename T>
void dequantize_block(const C* qweight, const float* scale, T* out, int64_t M, int64_t N, int64_t D, int64_t rows, int64_t columns, int64_t threads) {
  const int64_t blocks = (D + columns - 1) / columns;
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < M * N; row++) {
    const float* scales = scale + (row / N * ((N + rows - 1) / rows) + row % N / rows) * blocks;
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t from = row * D + b * columns, width = std::min(columns, D - b * columns);
      int64_t c = 0;
      for (; c + LANES <= width; c += LANES) store(out + from + c, load(qweight + from + c) * scales[b]);
      if (c < width) store_some(out + from + c, load_some(qweight + from + c, width - c) * scales[b], width - c);
    }
  }
}

// N rows of D numbers, two levels per byte, the first in the high bits, times a scale per 64 numbers. Rows of qweight fill their last block.
template <typename T>
void dequantize_nf4(const uint8_t* qweight, const bf16* scale, const float* levels, T* out, int64_t N, int64_t D, int64_t threads) {
  constexpr int64_t BLOCK = 64;
  const int64_t blocks = (D + BLOCK - 1) / BLOCK;
  float pairs[256][2];
  for (int64_t byte = 0; byte < 256; byte++) pairs[byte][0] = levels[byte >> 4], pairs[byte][1] = levels[byte & 15];
#pragma omp parallel for num_threads(threads)
  for (int64_t n = 0; n < N; n++)
    for (int64_t b = 0; b < blocks; b++) {
      float block[BLOCK];
      for (int64_t i = 0; i < BLOCK / 2; i++) std::memcpy(block + 2 * i, pairs[qweight[(n * blocks + b) * BLOCK / 2 + i]], 2 * sizeof(float));
      const float factor = to_float(scale[n * blocks + b]);
      const int64_t width = std::min(BLOCK, D - b * BLOCK);
      for (int64_t c = 0; c < width; c += LANES) store_some(out + n * D + b * BLOCK + c, load(block + c) * factor, width - c);
    }
}

// N rows of width I; rows of gate and of up are `stride` apart.
template <typename T>
void swiglu(const T* gate, const T* up, T* out, int64_t N, int64_t I, int64_t stride, int64_t threads) {
#pragma omp parallel for num_threads(threads) collapse(2)
  for (int64_t n = 0; n < N; n++)
    for (int64_t i = 0; i < I; i += LANES) {
      const vf g = load_some(gate + n * stride + i, I - i);
      store_some(out + n * I + i, g * sigmoid(g) * load_some(up + n * stride + i, I - i), I - i);
    }
}

template <typename T>
void swiglu_backward(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t N, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < N; i += LANES) {
    const vf d = load_some(grad + i, N - i), g = load_some(gate + i, N - i), u = load_some(up + i, N - i), s = sigmoid(g);
    store_some(grad_gate + i, d * u * s * (1 + g * (1 - s)), N - i);
    store_some(grad_up + i, d * g * s, N - i);
  }
}

// x: H heads of R each per row, strides in elements. table: (table_rows, R / 2) pairs, row n uses n % table_rows.
template <typename T>
void rotate(const T* x, const float* table, T* out, int64_t N, int64_t H, int64_t R, int64_t x_n, int64_t x_h, int64_t table_rows,
            bool interleaved, float sign, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t n = 0; n < N; n++) {
    float row[4096];
    for (int64_t h = 0; h < H; h++) {
      for (int64_t c = 0; c < R; c += LANES) store_some(row + c, load_some(x + n * x_n + h * x_h + c, R - c), R - c);
      rotate_pairs(row, table + n % table_rows * R, R, interleaved, sign);
      for (int64_t c = 0; c < R; c += LANES) store_some(out + (n * H + h) * R + c, load(row + c), R - c);
    }
  }
}

// Log of the sum of exponentials of logits / temperature, the target's log-probability, and the entropy unless null.
template <typename T>
void logprobs(const T* logits, const int64_t* targets, float* normalizer, float* logprob, float* entropy, int64_t N, int64_t V,
               double temperature, int64_t threads) {
  const float inverse_temperature = float(1 / temperature);
#pragma omp parallel for num_threads(threads)
  for (int64_t n = 0; n < N; n++) {
    const T* row = logits + n * V;
    vf top = splat(-INFINITY), total{}, weighted{};
    int64_t c = 0;
    for (; c + LANES <= V; c += LANES) top = larger(load(row + c), top);
    float best = largest(top);
    for (int64_t rest = c; rest < V; rest++) best = std::max(best, to_float(row[rest]));
    for (c = 0; c + LANES <= V; c += LANES) {
      const vf x = (load(row + c) - best) * inverse_temperature, p = exp_of(x);
      total += p;
      weighted += p * x;
    }
    float mass = sum(total), mean = sum(weighted);
    for (; c < V; c++) {
      const float x = (to_float(row[c]) - best) * inverse_temperature, p = std::exp(x);
      mass += p;
      mean += p * x;
    }
    normalizer[n] = best * inverse_temperature + std::log(mass);
    logprob[n] = to_float(row[targets[n]]) * inverse_temperature - normalizer[n];
    if (entropy) entropy[n] = std::log(mass) - mean / mass;
  }
}

// Replaces logits by their gradients, given the gradient of the target's log-probability.
template <typename T>
void logprobs_backward(T* logits, const int64_t* targets, const float* normalizer, const float* grad, int64_t N, int64_t V,
                        double temperature, int64_t threads) {
  const float inverse_temperature = float(1 / temperature);
#pragma omp parallel for num_threads(threads)
  for (int64_t n = 0; n < N; n++) {
    T* row = logits + n * V;
    const float scale = grad[n] * inverse_temperature;
    const float target = std::exp(to_float(row[targets[n]]) * inverse_temperature - normalizer[n]);
    for (int64_t c = 0; c < V; c += LANES) store_some(row + c, exp_of(load_some(row + c, V - c) * inverse_temperature - normalizer[n]) * -scale, V - c);
    put(row + targets[n], scale * (1 - target));
  }
}

}  // namespace

#define BOTH(NAME, PARAMETERS, CALL)                \
  extern "C" void NAME##_fp32 PARAMETERS {          \
    typedef float T;                                \
    CALL;                                           \
  }                                                 \
  extern "C" void NAME##_bf16 PARAMETERS {          \
    typedef bf16 T;                                 \
    CALL;                                           \
  }

BOTH(rms_norm, (const void* x, const float* weight, void* y, float* inverse, int64_t N, int64_t D, int64_t stride, double eps, int64_t threads),
     norm<T>((const T*)x, weight, (T*)y, inverse, N, D, stride, eps, threads))
BOTH(add_norm,
     (void* x, const void* first, const void* second, const float* weight, void* y, int64_t N, int64_t D, double eps, int64_t threads),
     add_norm<T>((T*)x, (const T*)first, (const T*)second, weight, (T*)y, N, D, eps, threads))
BOTH(rms_norm_backward,
     (const void* grad, const void* x, const float* weight, const float* inverse, void* grad_x, float* grad_weight, int64_t N, int64_t D,
      int64_t stride, int64_t threads),
     norm_backward<T>((const T*)grad, (const T*)x, weight, inverse, (T*)grad_x, grad_weight, N, D, stride, threads))
BOTH(dequantize_e4m3,
     (const void* qweight, const float* scale, void* out, int64_t M, int64_t N, int64_t D, int64_t rows, int64_t columns, int64_t threads),
     dequantize_block((const e4m3*)qweight, scale, (T*)out, M, N, D, rows, columns, threads))
BOTH(dequantize_int8,
     (const void* qweight, const float* scale, void* out, int64_t M, int64_t N, int64_t D, int64_t rows, int64_t columns, int64_t threads),
     dequantize_block((const int8_t*)qweight, scale, (T*)out, M, N, D, rows, columns, threads))
BOTH(dequantize_nf4, (const uint8_t* qweight, const bf16* scale, const float* levels, void* out, int64_t N, int64_t D, int64_t threads),
     dequantize_nf4(qweight, scale, levels, (T*)out, N, D, threads))
BOTH(swiglu, (const void* gate, const void* up, void* out, int64_t N, int64_t I, int64_t stride, int64_t threads),
     swiglu<T>((const T*)gate, (const T*)up, (T*)out, N, I, stride, threads))
BOTH(swiglu_backward, (const void* grad, const void* gate, const void* up, void* grad_gate, void* grad_up, int64_t N, int64_t threads),
     swiglu_backward<T>((const T*)grad, (const T*)gate, (const T*)up, (T*)grad_gate, (T*)grad_up, N, threads))
BOTH(rotate,
     (const void* x, const float* table, void* out, int64_t N, int64_t H, int64_t R, int64_t x_n, int64_t x_h, int64_t table_rows,
      int64_t interleaved, double sign, int64_t threads),
     rotate<T>((const T*)x, table, (T*)out, N, H, R, x_n, x_h, table_rows, interleaved, float(sign), threads))
BOTH(logprobs,
     (const void* logits, const int64_t* targets, float* normalizer, float* logprob, float* entropy, int64_t N, int64_t V,
      double temperature, int64_t threads),
     logprobs<T>((const T*)logits, targets, normalizer, logprob, entropy, N, V, temperature, threads))
BOTH(logprobs_backward,
     (void* logits, const int64_t* targets, const float* normalizer, const float* grad, int64_t N, int64_t V, double temperature,
      int64_t threads),
     logprobs_backward<T>((T*)logits, targets, normalizer, grad, N, V, temperature, threads))
