// Sixteen lanes at a time, in GCC's portable vectors: AVX-512 where the machine has it, several narrower ones elsewhere.
//
// Numbers are read as float, bf16, e4m3 or int8 and computed in float. A "unit" is what one step of a matrix product consumes
// of a row: a float, or a pair of bf16.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

constexpr int64_t LANES = 16;
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef float vf_any __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(64), aligned(2), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(32), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};
struct e4m3 {
  int8_t bits;
};

// Room for `count` numbers, from the beginning of a line of the processor's cache; whole vectors of them.
struct Free {
  void operator()(void* held) const { std::free(held); }
};
template <typename T>
using Room = std::unique_ptr<T[], Free>;
template <typename T>
Room<T> room_for(int64_t count) {
  return Room<T>(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64)));
}

inline int64_t round_up(int64_t value) { return (value + LANES - 1) / LANES * LANES; }
inline vf splat(float x) { return vf{} + x; }

inline vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
inline vf load(const bf16* p) {
#ifdef __AVX512F__
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
  return (vf)(__builtin_convertvector(vh(*reinterpret_cast<const vh_any*>(p)), vu) << 16);
#endif
}
inline vi load_bytes(const int8_t* p) {
#ifdef __AVX512F__
  return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  typedef int8_t bytes __attribute__((vector_size(16)));
  typedef int16_t words __attribute__((vector_size(32)));  // in one step GCC widens them one by one
  bytes held;
  std::memcpy(&held, p, sizeof(held));
  return __builtin_convertvector(__builtin_convertvector(held, words), vi);
#endif
}
inline vf load(const int8_t* p) { return __builtin_convertvector(load_bytes(p), vf); }
inline vf load(const e4m3* p) {  // the bits in their new places and another bias; below 2^-6 whole multiples of 2^-9
  const vu x = (vu)load_bytes(&p->bits), magnitude = x & 0x7f;
  const vf small = __builtin_convertvector((vi)magnitude, vf) * 0x1p-9f;
  const vu bits = magnitude < 8 ? (vu)small : (magnitude << 20) + (120u << 23);
  return (vf)((magnitude == 0x7f ? bits | 0x7fc00000 : bits) | (x & 0x80) << 24);
}
inline void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }

inline vh round_to_bf16(vf x) {  // to nearest, ties to even
#ifdef __AVX512BF16__
  return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
  const vu bits = (vu)x;
  const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(x != x ? (bits >> 16) | 0x40 : rounded, vh);
#endif
}
inline void store(bf16* p, vf x) { *reinterpret_cast<vh_any*>(p) = round_to_bf16(x); }

// bf16 of 32 numbers in their order.
inline vu join(vf first, vf second) {
#ifdef __AVX512BF16__
  return (vu)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
#else
  const vh a = round_to_bf16(first), b = round_to_bf16(second);
  return (vu)__builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25,
                                     26, 27, 28, 29, 30, 31);
#endif
}

// bf16 of `even` in the low halves, of `odd` in the high ones.
inline vu pair_up(vf even, vf odd) {
#ifdef __AVX512BF16__
  typedef uint16_t vh32 __attribute__((vector_size(64)));
  const vh32 both = (vh32)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  return (vu)__builtin_shufflevector(both, both, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26,
                                     11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
  return __builtin_convertvector(round_to_bf16(even), vu) | (__builtin_convertvector(round_to_bf16(odd), vu) << 16);
#endif
}

inline vf load_units(const float* p) { return load(p); }
inline vu load_units(const uint32_t* p) { return *reinterpret_cast<const vu_any*>(p); }

// sum + a * b, of bf16 both of each pair.
inline vf multiply_add(vf sum, vf a, vf b) { return sum + a * b; }
inline vf multiply_add(vf sum, vu a, vu b) {
#ifdef __AVX512BF16__
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  return sum + (vf)(a << 16) * (vf)(b << 16) + (vf)(a & 0xffff0000u) * (vf)(b & 0xffff0000u);
#endif
}

template <typename T>
struct Format;
template <>
struct Format<float> {
  typedef float Unit;
  static constexpr int64_t STEP = 1;      // elements of K per unit
  static constexpr int64_t WIDE = LANES;  // elements of 16 units
  static vf load_wide(const float* p) { return load_units(p); }
};
template <>
struct Format<bf16> {
  typedef uint32_t Unit;
  static constexpr int64_t STEP = 2;
  static constexpr int64_t WIDE = 2 * LANES;
  static vu load_wide(const bf16* p) { return load_units(reinterpret_cast<const uint32_t*>(p)); }
};
template <>
struct Format<int8_t> {  // bf16 holds each of its numbers exactly
  typedef uint32_t Unit;
  static constexpr int64_t STEP = 2;
  static constexpr int64_t WIDE = 2 * LANES;
  static vu load_wide(const int8_t* p) { return join(load(p), load(p + LANES)); }
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) { p->bits = round_to_bf16(splat(x))[0]; }

// Ask for a row before it is needed.
template <typename T>
inline void prefetch(const T* row, int64_t width) {
  for (int64_t c = 0; c < width; c += int64_t(64 / sizeof(T))) __builtin_prefetch(row + c);
}

// The first `count` lanes of p, zero beyond.
template <typename T>
inline vf load_some(const T* p, int64_t count) {
  if (count >= LANES) return load(p);
  T held[LANES] = {};
  std::memcpy(held, p, count * sizeof(T));
  return load(held);
}
template <typename T>
inline void store_some(T* p, vf x, int64_t count) {
  if (count >= LANES) return store(p, x);
  T held[LANES];
  store(held, x);
  std::memcpy(p, held, count * sizeof(T));
}

template <typename From, typename To>
void copy_row(const From* from, To* to, int64_t width) {
  for (int64_t c = 0; c < width; c += LANES) store_some(to + c, load_some(from + c, width - c), width - c);
}

inline float sum(vf x) {
  typedef float v8 __attribute__((vector_size(32)));
  typedef float v4 __attribute__((vector_size(16)));
  const v8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  const v4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[2]) + (b[1] + b[3]);
}
inline bool any(vi held) {  // of a comparison
#ifdef __AVX512F__
  return _mm512_test_epi32_mask((__m512i)held, (__m512i)held);
#else
  int32_t found = 0;
  for (int i = 0; i < LANES; i++) found |= held[i];
  return found;
#endif
}
inline vf larger(vf a, vf b) { return a < b ? b : a; }  // a where unordered: NaN in a stays
inline float largest(vf x) {
  typedef float v8 __attribute__((vector_size(32)));
  typedef float v4 __attribute__((vector_size(16)));
  v8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7), b = __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  a = a < b ? b : a;
  v4 c = __builtin_shufflevector(a, a, 0, 1, 2, 3), d = __builtin_shufflevector(a, a, 4, 5, 6, 7);
  c = c < d ? d : c;
  return std::max(std::max(c[0], c[1]), std::max(c[2], c[3]));
}

// e^x within 2 ulp; what would be below 1e-38 may come out as 0, and that of -inf does. NaN stays NaN. Cody and Waite's reduction,
// Cephes' polynomial.
inline vf exp_of(vf x) {
#ifdef __AVX512F__
  x = x < splat(-104.0f) ? splat(-104.0f) : x;
  const vf n = (vf)_mm512_roundscale_ps((__m512)(x * 1.44269504f), 0);  // to the nearest integer
#else
  const vi gone = x < splat(-87.0f);
  x = gone ? splat(-87.0f) : x;
  const vf n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
#endif
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
#ifdef __AVX512F__
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return gone ? vf{} : p * (vf)((__builtin_convertvector(n, vi) + 127) << 23);
#endif
}
inline vf sigmoid(vf x) {
  return 1.0f / (1.0f + exp_of(x > splat(-88.0f) ? -x : splat(88.0f)));
}

// out = x scaled to a root mean square of 1, times weight; returns the scale.
template <typename From, typename To>
inline float norm_row(const From* x, const float* weight, To* out, int64_t width, double eps) {
  vf total{};
  for (int64_t c = 0; c < width; c += LANES) {
    const vf v = load_some(x + c, width - c);
    total += v * v;
  }
  const float scale = 1 / std::sqrt(sum(total) / width + float(eps));
  for (int64_t c = 0; c < width; c += LANES)
    store_some(out + c, load_some(x + c, width - c) * scale * load_some(weight + c, width - c), width - c);
  return scale;
}

// Pairs of x[0..R) as complex numbers times the table's (cos, sin), or times its conjugate for sign = -1. Pairs are
// neighbours, or R / 2 apart.
inline void turn(float* x, const float* table, int64_t R, bool interleaved, float sign) {
  const vf signs = {-sign, sign, -sign, sign, -sign, sign, -sign, sign, -sign, sign, -sign, sign, -sign, sign, -sign, sign};
  int64_t i = 0;
  if (interleaved) {
    for (; i + LANES <= R; i += LANES) {
      const vf old = load(x + i), angle = load(table + i);
      const vf cos = __builtin_shufflevector(angle, angle, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14);
      const vf sin = __builtin_shufflevector(angle, angle, 1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15);
      const vf crossed = __builtin_shufflevector(old, old, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
      store(x + i, old * cos + crossed * sin * signs);
    }
  } else {
    for (; i + LANES <= R / 2; i += LANES) {
      const vf a = load(table + 2 * i), b = load(table + 2 * i + LANES), re = load(x + i), im = load(x + i + R / 2);
      const vf cos = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      const vf sin = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31) * sign;
      store(x + i, re * cos - im * sin);
      store(x + i + R / 2, re * sin + im * cos);
    }
    i *= 2;
  }
  const int64_t apart = interleaved ? 1 : R / 2, next = interleaved ? 2 : 1;
  for (i /= 2; i < R / 2; i++) {
    float &re = x[i * next], &im = x[i * next + apart];
    const float cos = table[2 * i], sin = sign * table[2 * i + 1], old = re;
    re = old * cos - im * sin;
    im = old * sin + im * cos;
  }
}
