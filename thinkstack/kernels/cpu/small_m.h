// Products of a few rows of x with a matrix: each row of the matrix is read once and multiplied with all rows of x.
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

// 2 * LANES numbers in float, in the order in which weights of type M are unpacked: bf16 by shifts, evens before odds.
struct FloatPair {
  vf first, second;
};
inline FloatPair unpack(const bf16* p, bf16) {
  const vu pairs = load_units(reinterpret_cast<const uint32_t*>(p));
  return {(vf)(pairs << 16), (vf)(pairs & 0xffff0000u)};
}
template <typename T>
inline FloatPair unpack(const T* p, int8_t) {
  return {load(p), load(p + LANES)};
}

// N rows of bf16 for products with matrices of M, in float.
template <int N, typename M>
class Input {
 public:
  // max_k: the largest K.
  explicit Input(int64_t max_k) : floats_(N * max_k) {}

  // Load rows x (N, K); K a multiple of 32.
  void take(const bf16* x, int64_t K) {
    K_ = K;
    for (int64_t c = 0; c < N * K; c += 2 * LANES) {
      const FloatPair both = unpack(x + c, M());
      store(floats_.data() + c, both.first);
      store(floats_.data() + c + LANES, both.second);
    }
  }

  // Dot products of row m of weights with each row.
  void dots(Matrix<M> weights, int64_t m, float* out) const {
    const M* weight = weights.data + m * K_;
    vf sum[N] = {}, second[N] = {};
    for (int64_t c = 0; c < K_; c += 2 * LANES) {
      const FloatPair w = unpack(weight + c, M());
      UNROLLED for (int n = 0; n < N; n++) {
        sum[n] += load(floats_.data() + n * K_ + c) * w.first;
        (N > 4 ? sum : second)[n] += load(floats_.data() + n * K_ + c + LANES) * w.second;  // for small N, two chains of additions hide their latency
      }
    }
    UNROLLED for (int n = 0; n < N; n++) out[n] = ::sum(sum[n] + second[n]) * (weights.scale ? weights.scale[m] : 1);
  }

 private:
  std::vector<float> floats_;
  int64_t K_;
};

#ifdef __AVX512BF16__
// In pairs of bf16. The rows are referenced, not copied.
template <int N>
class Input<N, bf16> {
 public:
  explicit Input(int64_t) {}

  void take(const bf16* x, int64_t K) { x_ = x, K_ = K; }

  void dots(Matrix<bf16> weights, int64_t m, float* out) const {
    constexpr int CHAINS = N >= 4 ? 1 : 4 / N;  // independent chains of additions
    constexpr int64_t WIDE = Format<bf16>::WIDE;
    const bf16* weight = weights.data + m * K_;
    vf sum[N][CHAINS] = {};
    int64_t c = 0;
    for (; c + CHAINS * WIDE <= K_; c += CHAINS * WIDE)
      UNROLLED for (int j = 0; j < CHAINS; j++) add(weight, c + j * WIDE, sum, j);
    for (; c < K_; c += WIDE) add(weight, c, sum, 0);
    UNROLLED for (int n = 0; n < N; n++) {
      for (int j = 1; j < CHAINS; j++) sum[n][0] += sum[n][j];
      out[n] = ::sum(sum[n][0]);
    }
  }

 private:
  template <int CHAINS>
  INLINED void add(const bf16* weight, int64_t c, vf (&sum)[N][CHAINS], int j) const {
    const vu w = Format<bf16>::load_wide(weight + c);
    UNROLLED for (int n = 0; n < N; n++) sum[n][j] = multiply_add(sum[n][j], Format<bf16>::load_wide(x_ + n * K_ + c), w);
  }

  const bf16* x_;
  int64_t K_;
};
#endif

#ifdef __AVX2__
// Products with int8 weights in integers: converting them to float first would take longer than reading them. A row of x is
// converted to integers of 22 bits and sign times a power of two, and these are split into pieces that the processor
// multiplies: three of 8 bits with VNNI (products of four bytes), else two of 11 bits. Sums of their products are exact. bf16
// has 8 bits: numbers down to 2^-14 of the row's largest are exact, and smaller ones lose what a float sum would lose.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
struct Pieces {
  typedef int8_t Piece;
  static constexpr int COUNT = 3, BITS = 8;
  static constexpr int64_t WIDE = 64, SPAN = 1 << 16;  // numbers per step; numbers whose sums fit into 32 bits
  typedef __m512i QWeights;
  static QWeights load(const int8_t* p) { return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128)); }  // + 128: one factor must be unsigned
  static vi add(vi sum, QWeights qweights, const Piece* x) { return (vi)_mm512_dpbusd_epi32((__m512i)sum, qweights, _mm512_loadu_si512(x)); }
  static constexpr int32_t OFFSET = 128;  // added to every weight
  static QWeights offset() { return _mm512_set1_epi8(char(OFFSET)); }
};
#else
struct Pieces {
  typedef int16_t Piece;
  static constexpr int COUNT = 2, BITS = 11;
  static constexpr int64_t WIDE = 2 * LANES, SPAN = 1 << 14;
  static constexpr int32_t OFFSET = 0;
#ifdef __AVX512BW__
  typedef __m512i QWeights;
  static QWeights load(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
  static vi add(vi sum, QWeights qweights, const Piece* x) { return sum + (vi)_mm512_madd_epi16(qweights, _mm512_loadu_si512(x)); }
#else
  typedef __m256i QWeights;
  static QWeights load(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
  static vi add(vi sum, QWeights qweights, const Piece* x) { return sum + (vi)_mm256_madd_epi16(qweights, _mm256_loadu_si256((const __m256i*)x)); }
#endif
  static QWeights offset() { return QWeights{}; }
};
#endif

template <int N>
class Input<N, int8_t> : Pieces {
 public:
  explicit Input(int64_t max_k) : stride_((max_k + WIDE - 1) / WIDE * WIDE), pieces_(N * COUNT * stride_) {}

  void take(const bf16* x, int64_t K) {
    K_ = K;
    UNROLLED for (int n = 0; n < N; n++) {
      vu top{};
      for (int64_t c = 0; c < K; c += LANES) {
        const vu magnitude = (vu)::load(x + n * K + c) & 0x7fffffff;  // NaN is the largest
        top = magnitude > top ? magnitude : top;
      }
      uint32_t peak = 64u << 23;  // 2^-63
      for (int i = 0; i < LANES; i++) peak = std::max(peak, top[i]);
      const float power = float_of(peak & 0x7f800000);
      factor_[n] = peak < 0x7f800000 ? power * 0x1p-21f : NAN;
      split(x + n * K, 0x1p21f / power, n);
    }
  }

  void dots(Matrix<int8_t> weights, int64_t m, float* out) const {
    const int8_t* weight = weights.data + m * K_;
    std::fill(out, out + N, 0.0f);
    for (int64_t from = 0; from < K_; from += SPAN) span<0>(weight, from, std::min(from + SPAN, K_), out);
    UNROLLED for (int n = 0; n < N; n++) out[n] *= factor_[n] * weights.scale[m];
  }

 private:
  typedef Piece Narrow __attribute__((vector_size(sizeof(Piece) * LANES)));
  static constexpr int ROWS_AT_ONCE = std::min<int>(N, REGISTERS / 2 / COUNT);  // rows whose sums stay in registers

  const Piece* piece(int n, int p) const { return pieces_.data() + (n * COUNT + p) * stride_; }
  static vf as_float(vi x) { return __builtin_convertvector(x, vf); }
  static float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }

  // Dot products over numbers [from, to) for the rows from FIRST on.
  template <int FIRST>
  void span(const int8_t* weight, int64_t from, int64_t to, float* out) const {
    constexpr int ROWS = std::min(ROWS_AT_ONCE, N - FIRST);
    vi sum[ROWS][COUNT] = {};
    const auto add = [&](int64_t c, QWeights qweights) INLINED {
      UNROLLED for (int n = 0; n < ROWS; n++)
        UNROLLED for (int p = 0; p < COUNT; p++) sum[n][p] = Pieces::add(sum[n][p], qweights, piece(FIRST + n, p) + c);
    };
    int64_t c = from;
    for (; c + WIDE <= to; c += WIDE) add(c, Pieces::load(weight + c));
    if (c < to) {
      int8_t last[WIDE] = {};
      std::memcpy(last, weight + c, to - c);
      add(c, Pieces::load(last));
    }
    UNROLLED for (int n = 0; n < ROWS; n++) {
      vf total{};
      for (int p = COUNT; p-- > 0;) total = total * float(1 << BITS) + as_float(sum[n][p] - (from ? vi{} : offset_sums_[FIRST + n][p]));
      out[FIRST + n] += ::sum(total);
    }
    if constexpr (FIRST + ROWS < N) span<FIRST + ROWS>(weight, from, to, out);
  }

  // Split row n into its pieces, the lowest first, and compute what OFFSET adds to its sums.
  void split(const bf16* x, float scale, int n) {
    for (int64_t c = 0; c < (K_ + WIDE - 1) / WIDE * WIDE; c += LANES) {
      vi rest{};
      if (c < K_) rest = nearest(::load(x + c) * scale);
      UNROLLED for (int p = 0; p < COUNT; p++) {
        vi low = rest;
        if (p + 1 < COUNT) low = (rest << (32 - BITS)) >> (32 - BITS);  // with its sign
        const Narrow narrow = __builtin_convertvector(low, Narrow);
        std::memcpy(const_cast<Piece*>(piece(n, p)) + c, &narrow, sizeof(narrow));
        rest = (rest - low) >> BITS;
      }
    }
    UNROLLED for (int p = 0; p < COUNT; p++) {
      offset_sums_[n][p] = vi{};
      if constexpr (OFFSET != 0) {
        for (int64_t c = 0; c < K_; c += WIDE) offset_sums_[n][p] = Pieces::add(offset_sums_[n][p], Pieces::offset(), piece(n, p) + c);
      }
    }
  }
  static vi nearest(vf x) {
#ifdef __AVX512F__
    return (vi)_mm512_cvtps_epi32((__m512)x);
#else
    return (vi)_mm256_cvtps_epi32((__m256)x);
#endif
  }

  int64_t stride_, K_;
  std::vector<Piece> pieces_;  // (N, COUNT, stride)
  vi offset_sums_[N][COUNT];
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
