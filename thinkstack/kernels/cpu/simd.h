// LANES numbers at a time, in GCC's portable vectors: 16 with AVX-512, 8 with AVX2, 4 elsewhere (NEON, SSE).
//
// Numbers are loaded from float, bf16, e4m3 or int8 and computed in float. A "unit" is the part of a row that one step of a
// matrix product uses: a float, or a pair of bf16.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int64_t LANES = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int64_t LANES = 4, REGISTERS = 32;
#else
constexpr int64_t LANES = 4, REGISTERS = 16;
#endif
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef uint16_t vhh __attribute__((vector_size(4 * LANES)));  // twice as many
typedef float vf_any __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

// A loop of few iterations whose results must stay in registers.
#define UNROLLED _Pragma("GCC unroll 16")
#define INLINED __attribute__((always_inline))

// Lane i becomes lane P::at(i) of the concatenation of a and b.
template <typename P, typename V, int... I>
inline V shuffled(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, P::at(I)...);
}
template <typename P, typename V>
inline V shuffle(V a, V b) {
  return shuffled<P>(a, b, std::make_integer_sequence<int, sizeof(V) / sizeof(a[0])>());
}
struct Evens {
  static constexpr int at(int i) { return 2 * i; }
};
struct Odds {
  static constexpr int at(int i) { return 2 * i + 1; }
};
struct TwiceEvens {
  static constexpr int at(int i) { return i & ~1; }
};
struct TwiceOdds {
  static constexpr int at(int i) { return i | 1; }
};
struct Crossed {
  static constexpr int at(int i) { return i ^ 1; }
};
struct Alternating {
  static constexpr int at(int i) { return i + i % 2 * int(LANES); }
};
template <int FROM, int APART>
struct Zipped {  // alternately one of each
  static constexpr int at(int i) { return FROM + i / 2 + i % 2 * APART; }
};

struct bf16 {
  uint16_t bits;
};
struct e4m3 {
  int8_t bits;
};

// Memory for `count` numbers, aligned to a cache line and padded to whole vectors.
struct Free {
  void operator()(void* held) const { std::free(held); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;
template <typename T>
Buffer<T> make_buffer(int64_t count) {
  return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64)));
}

inline int64_t round_up(int64_t value) { return (value + LANES - 1) / LANES * LANES; }
inline vf splat(float x) { return vf{} + x; }
inline vi iota() {  // 0, 1, 2, ...
  vi lane;
  for (int i = 0; i < LANES; i++) lane[i] = i;
  return lane;
}

inline vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
inline vf load(const bf16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  return (vf)(__builtin_convertvector(vh(*reinterpret_cast<const vh_any*>(p)), vu) << 16);
#endif
}
inline vi load_bytes(const int8_t* p) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  vi found;
  for (int i = 0; i < LANES; i++) found[i] = p[i];
  return found;
#endif
}
inline vf load(const int8_t* p) { return __builtin_convertvector(load_bytes(p), vf); }
inline vf load(const e4m3* p) {  // shifts the bits and changes the bias; below 2^-6, multiples of 2^-9
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

// `even` as bf16 in the low halves, `odd` in the high halves.
inline vu pair_up(vf even, vf odd) {
#ifdef __AVX512BF16__
  const vhh both = (vhh)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  return (vu)shuffle<Zipped<0, LANES>>(both, both);
#else
  return __builtin_convertvector(round_to_bf16(even), vu) | (__builtin_convertvector(round_to_bf16(odd), vu) << 16);
#endif
}

inline vf load_units(const float* p) { return load(p); }
inline vu load_units(const uint32_t* p) { return *reinterpret_cast<const vu_any*>(p); }

// sum + a * b; for bf16, of both numbers of each pair.
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
  static constexpr int64_t WIDE = LANES;  // elements of a vector of units
  static vf load_wide(const float* p) { return load_units(p); }
};
template <>
struct Format<bf16> {
  typedef uint32_t Unit;
  static constexpr int64_t STEP = 2;
  static constexpr int64_t WIDE = 2 * LANES;
  static vu load_wide(const bf16* p) { return load_units(reinterpret_cast<const uint32_t*>(p)); }
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

// Prefetch a row.
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

typedef float v4 __attribute__((vector_size(16)));
typedef float v8 __attribute__((vector_size(32)));
inline float sum(v4 x) { return (x[0] + x[2]) + (x[1] + x[3]); }
inline float largest(v4 x) { return std::max(std::max(x[0], x[1]), std::max(x[2], x[3])); }
#ifdef __AVX2__
inline v4 low(v8 x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3); }
inline v4 high(v8 x) { return __builtin_shufflevector(x, x, 4, 5, 6, 7); }
inline float sum(v8 x) { return sum(low(x) + high(x)); }
inline float largest(v8 x) { return largest(low(x) < high(x) ? high(x) : low(x)); }
#endif
#ifdef __AVX512F__
inline v8 low(vf x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7); }
inline v8 high(vf x) { return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15); }
inline float sum(vf x) { return sum(low(x) + high(x)); }
inline float largest(vf x) { return largest(low(x) < high(x) ? high(x) : low(x)); }
#endif
inline bool any(vi held) {  // `held`: the result of a comparison
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)held, (__m512i)held);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)held);
#else
  return held[0] | held[1] | held[2] | held[3];
#endif
}
inline vf larger(vf a, vf b) { return a < b ? b : a; }  // a where unordered: NaN in a stays

// e^x within 2 ulp. Results below 1e-38 may be 0, and e^-inf is 0. NaN stays NaN. Cody and Waite's reduction, Cephes'
// polynomial.
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
// neighbors, or R / 2 apart.
inline void rotate_pairs(float* x, const float* table, int64_t R, bool interleaved, float sign) {
  const vf signs = shuffle<Alternating>(splat(-sign), splat(sign));
  int64_t i = 0;
  if (interleaved) {
    for (; i + LANES <= R; i += LANES) {
      const vf old = load(x + i), angle = load(table + i);
      const vf cos = shuffle<TwiceEvens>(angle, angle), sin = shuffle<TwiceOdds>(angle, angle), crossed = shuffle<Crossed>(old, old);
      store(x + i, old * cos + crossed * sin * signs);
    }
  } else {
    for (; i + LANES <= R / 2; i += LANES) {
      const vf a = load(table + 2 * i), b = load(table + 2 * i + LANES), re = load(x + i), im = load(x + i + R / 2);
      const vf cos = shuffle<Evens>(a, b), sin = shuffle<Odds>(a, b) * sign;
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
