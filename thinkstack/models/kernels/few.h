// Products of a few rows of x with a matrix: each row of the matrix is read once, as it is stored, and meets them all.
#pragma once
#include <algorithm>
#include <vector>

#include "simd.h"

// Rows of K numbers: bf16, or int8 with a scale for each row.
template <typename M>
struct Matrix {
  const M* data;
  const float* scale;  // null: 1
};

// N rows of bf16 to be multiplied with matrices of M.
template <int N, typename M>
class Input {
 public:
  explicit Input(int64_t) {}

  // Take rows x (N, K), which must stay; K a multiple of 32.
  void take(const bf16* x, int64_t K) { x_ = x, K_ = K; }

  // Sums of row m of weights with each of them.
  void dots(Matrix<M> weights, int64_t m, float* out) const {
    constexpr int CHAINS = N >= 4 ? 1 : 4 / N;  // additions that do not wait for each other
    constexpr int64_t WIDE = Format<bf16>::WIDE;
    const M* weight = weights.data + m * K_;
    const float scale = weights.scale ? weights.scale[m] : 1;
    vf sum[N][CHAINS] = {};
    int64_t c = 0;
    for (; c + CHAINS * WIDE <= K_; c += CHAINS * WIDE)
      for (int j = 0; j < CHAINS; j++) {
        const auto w = Format<M>::load_wide(weight + c + j * WIDE);
        for (int n = 0; n < N; n++) sum[n][j] = multiply_add(sum[n][j], Format<bf16>::load_wide(x_ + n * K_ + c + j * WIDE), w);
      }
    for (; c < K_; c += WIDE) {
      const auto w = Format<M>::load_wide(weight + c);
      for (int n = 0; n < N; n++) sum[n][0] = multiply_add(sum[n][0], Format<bf16>::load_wide(x_ + n * K_ + c), w);
    }
    for (int n = 0; n < N; n++) {
      for (int j = 1; j < CHAINS; j++) sum[n][0] += sum[n][j];
      out[n] = ::sum(sum[n][0]) * scale;
    }
  }

 private:
  const bf16* x_;
  int64_t K_;
};

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
// Where bytes are multiplied by fours, widening int8 first would take longer than reading it. A row of x is written in
// whole numbers of 22 bits and sign, times a power of two, and those in three signed bytes; sums of their products are
// exact. bf16 has 8 bits: nothing is lost of numbers down to 2^-14 of the row's largest, and of smaller ones what a sum
// in float would lose beside it.
template <int N>
class Input<N, int8_t> {
  static constexpr int PLANES = 3;
  static constexpr int64_t WIDE = 64;

 public:
  // most: the greatest K.
  explicit Input(int64_t most) : stride_((most + WIDE - 1) / WIDE * WIDE), planes_(N * PLANES * stride_) {}

  void take(const bf16* x, int64_t K) {
    K_ = K;
    for (int n = 0; n < N; n++) {
      vu top{};
      for (int64_t c = 0; c < K; c += LANES) {
        const vu magnitude = (vu)load(x + n * K + c) & 0x7fffffff;  // NaN counts most
        top = magnitude > top ? magnitude : top;
      }
      uint32_t peak = 64u << 23;  // 2^-63
      for (int i = 0; i < LANES; i++) peak = std::max(peak, top[i]);
      const float power = float_of(peak & 0x7f800000);
      factor_[n] = peak < 0x7f800000 ? power * 0x1p-21f : NAN;
      cut(x + n * K, 0x1p21f / power, n);
    }
  }

  void dots(Matrix<int8_t> weights, int64_t m, float* out) const {
    const int8_t* weight = weights.data + m * K_;
    __m512i sum[N][PLANES];
    for (int n = 0; n < N; n++)
      for (int p = 0; p < PLANES; p++) sum[n][p] = begin_[n][p];
    const auto add = [&](int64_t c, __m512i codes) {
      const __m512i raised = _mm512_xor_si512(codes, _mm512_set1_epi8(-128));  // + 128: one factor must be unsigned
      for (int n = 0; n < N; n++)
        for (int p = 0; p < PLANES; p++) sum[n][p] = _mm512_dpbusd_epi32(sum[n][p], raised, _mm512_loadu_si512(plane(n, p) + c));
    };
    int64_t c = 0;
    for (; c + WIDE <= K_; c += WIDE) add(c, _mm512_loadu_si512(weight + c));
    if (c < K_) add(c, _mm512_maskz_loadu_epi8((1ull << (K_ - c)) - 1, weight + c));
    for (int n = 0; n < N; n++) {
      const vf low = wide(sum[n][0]), middle = wide(sum[n][1]), high = wide(sum[n][2]);
      out[n] = ::sum(high * 65536.0f + middle * 256.0f + low) * (factor_[n] * weights.scale[m]);
    }
  }

 private:
  const int8_t* plane(int n, int p) const { return planes_.data() + (n * PLANES + p) * stride_; }
  static vf wide(__m512i x) { return __builtin_convertvector((vi)x, vf); }
  static float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }

  // Row n in its planes, and what takes the 128 of all codes off again.
  void cut(const bf16* x, float scale, int n) {
    for (int p = 0; p < PLANES; p++) begin_[n][p] = _mm512_setzero_si512();
    for (int64_t c = 0; c < (K_ + WIDE - 1) / WIDE * WIDE; c += LANES) {
      vi rest = c < K_ ? (vi)_mm512_cvtps_epi32((__m512)(load(x + c) * scale)) : vi{};
      for (int p = 0; p < PLANES; p++) {
        _mm_storeu_si128((__m128i*)(plane(n, p) + c), _mm512_cvtepi32_epi8((__m512i)rest));
        rest = (rest + 128) >> 8;
      }
    }
    for (int64_t c = 0; c < K_; c += WIDE)
      for (int p = 0; p < PLANES; p++)
        begin_[n][p] = _mm512_dpbusd_epi32(begin_[n][p], _mm512_set1_epi8(-128), _mm512_loadu_si512(plane(n, p) + c));
    for (int p = 0; p < PLANES; p++) begin_[n][p] = _mm512_sub_epi32(_mm512_setzero_si512(), begin_[n][p]);
  }

  int64_t stride_, K_;
  std::vector<int8_t> planes_;  // (N, PLANES, stride), the lowest first
  __m512i begin_[N][PLANES];
  float factor_[N];
};
#endif

// each(m, sums (N,)) for rows [from, to) of weights.
template <int N, typename M, typename Each>
void rows(Matrix<M> weights, const Input<N, M>& x, int64_t from, int64_t to, Each each) {
  for (int64_t m = from; m < to; m++) {
    float found[N];
    x.dots(weights, m, found);
    each(m, found);
  }
}
