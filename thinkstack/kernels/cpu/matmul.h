// Products of small matrices held in scratch memory: C (M, N) = A (M, K) B (K, N), N a multiple of LANES, C in float.
//
// A is read one unit at a time with any two strides, so a transposed A costs nothing. B is packed: one row per step, a
// unit per column. Every element of C is summed along K in order, so it does not depend on the other rows.
#pragma once
#include <memory>

#include "simd.h"

inline void store_units(float* p, vf x) { store(p, x); }
inline void store_units(uint32_t* p, vu x) { *reinterpret_cast<vu_any*>(p) = x; }

inline vf multiply_add(vf sum, float a, vf b) { return sum + a * b; }
inline vf multiply_add(vf sum, uint32_t a, vu b) { return multiply_add(sum, vu{} + a, b); }

template <typename U>
struct Operand {
  const U* data;
  int64_t row, step;  // strides in units
};

template <int ROWS, int VECTORS, typename U>
inline void tile(Operand<U> a, const U* b, int64_t b_step, float* c, int64_t c_row, int64_t steps, bool add) {
  vf sum[ROWS][VECTORS];
  UNROLLED for (int i = 0; i < ROWS; i++)
    UNROLLED for (int j = 0; j < VECTORS; j++) sum[i][j] = add ? load(c + i * c_row + j * LANES) : vf{};
  for (int64_t k = 0; k < steps; k++) {
    decltype(load_units(b)) column[VECTORS];
    UNROLLED for (int j = 0; j < VECTORS; j++) column[j] = load_units(b + k * b_step + j * LANES);
    UNROLLED for (int i = 0; i < ROWS; i++) {
      const U x = a.data[i * a.row + k * a.step];
      UNROLLED for (int j = 0; j < VECTORS; j++) sum[i][j] = multiply_add(sum[i][j], x, column[j]);
    }
  }
  UNROLLED for (int i = 0; i < ROWS; i++)
    UNROLLED for (int j = 0; j < VECTORS; j++) store(c + i * c_row + j * LANES, sum[i][j]);
}

constexpr int SUMS = REGISTERS * 3 / 4;                // vectors of sums; the other registers hold operands
constexpr int MOST_VECTORS = REGISTERS == 32 ? 4 : 2;  // of columns per tile

template <int VECTORS, typename U>
inline void column_of_tiles(Operand<U> a, const U* b, int64_t b_step, float* c, int64_t c_row, int64_t m, int64_t steps, bool add) {
  constexpr int ROWS = SUMS / VECTORS < 12 ? SUMS / VECTORS : 12;
  int64_t i = 0;
  for (; i + ROWS <= m; i += ROWS) tile<ROWS, VECTORS>({a.data + i * a.row, a.row, a.step}, b, b_step, c + i * c_row, c_row, steps, add);
  for (; i + 4 <= m; i += 4) tile<4, VECTORS>({a.data + i * a.row, a.row, a.step}, b, b_step, c + i * c_row, c_row, steps, add);
  if (i + 2 <= m) tile<2, VECTORS>({a.data + i * a.row, a.row, a.step}, b, b_step, c + i * c_row, c_row, steps, add), i += 2;
  if (i < m) tile<1, VECTORS>({a.data + i * a.row, a.row, a.step}, b, b_step, c + i * c_row, c_row, steps, add);
}

// The last columns, fewer than a tile has.
template <int VECTORS, typename U>
inline void last_columns(Operand<U> a, const U* b, int64_t b_step, float* c, int64_t c_row, int64_t m, int64_t rest, int64_t steps, bool add) {
  if constexpr (VECTORS > 0) {
    if (rest == VECTORS) return column_of_tiles<VECTORS>(a, b, b_step, c, c_row, m, steps, add);
    last_columns<VECTORS - 1>(a, b, b_step, c, c_row, m, rest, steps, add);
  }
}

// C = A B, or C += A B. n: columns, a multiple of LANES.
template <typename U>
void multiply(Operand<U> a, const U* b, int64_t b_step, float* c, int64_t c_row, int64_t m, int64_t n, int64_t steps, bool add) {
  constexpr int64_t WIDTH = MOST_VECTORS * LANES;
  int64_t j = 0;
  for (; j + WIDTH <= n; j += WIDTH) column_of_tiles<MOST_VECTORS>(a, b + j, b_step, c + j, c_row, m, steps, add);
  last_columns<MOST_VECTORS - 1>(a, b + j, b_step, c + j, c_row, m, (n - j) / LANES, steps, add);
}

// A matrix of `rows` x `width`; elements beyond read as zero.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride, rows, width;
  vf at(int64_t r, int64_t column) const {
    return r < rows && column < width ? load_some(data + r * stride + column, width - column) : vf{};
  }
};

// B whose steps run along the rows of `from`: out[(r / STEP) * columns + c], `count` rows, `columns` a multiple of LANES.
inline void pack_rows(Rows<float> from, float* out, int64_t count, int64_t columns) {
  for (int64_t r = 0; r < count; r++)
    for (int64_t c = 0; c < columns; c += LANES) store(out + r * columns + c, from.at(r, c));
}
template <typename S>
inline void pack_rows(Rows<S> from, uint32_t* out, int64_t count, int64_t columns) {
  for (int64_t r = 0; r < count; r += 2)
    for (int64_t c = 0; c < columns; c += LANES)
      store_units(out + r / 2 * columns + c, pair_up(from.at(r, c), from.at(r + 1, c)));
}

// A step of a transposition: rows i and i + S of a block exchange the lanes that are S apart. FIRST: the new row i.
template <int S, bool FIRST>
struct Exchanged {
  static constexpr int at(int i) { return FIRST ? (i & S ? int(LANES) + i - S : i) : (i & S ? int(LANES) + i : i + S); }
};

// The LANES x LANES block with rows x[0..LANES), transposed in place.
template <int S = LANES / 2>
inline void transpose(vu x[LANES]) {
  for (int i = 0; i < LANES; i++)
    if (!(i & S)) {
      const vu first = x[i], second = x[i + S];
      x[i] = shuffle<Exchanged<S, true>>(first, second);
      x[i + S] = shuffle<Exchanged<S, false>>(first, second);
    }
  if constexpr (S > 1) transpose<S / 2>(x);
}

// B whose steps run along the columns of `from` (so B = from transposed), in units of the same type: out[step * count + r].
// from: `count` rows (a multiple of LANES) of `steps` units. between(): called after every LANES x LANES units.
template <typename U, typename Between>
void pack_transposed(const U* from, int64_t stride, U* out, int64_t count, int64_t steps, Between between) {
  for (int64_t r = 0; r < count; r += LANES)
    for (int64_t k = 0; k < steps; k += LANES) {
      vu block[LANES];
      for (int i = 0; i < LANES; i++) std::memcpy(&block[i], from + (r + i) * stride + k, sizeof(vu));
      transpose(block);
      for (int i = 0; i < LANES && k + i < steps; i++) std::memcpy(out + (k + i) * count + r, &block[i], sizeof(vu));
      between();
    }
}
template <typename U>
void pack_transposed(const U* from, int64_t stride, U* out, int64_t count, int64_t steps) {
  pack_transposed(from, stride, out, count, steps, [] {});
}

// Scratch memory that is allocated in pieces. Reading one vector beyond a piece is allowed.
class Scratch {
 public:
  static constexpr int64_t SLACK = 128;  // of each piece, alignment included
  explicit Scratch(int64_t bytes) : held_(new char[bytes + 64]), next_(align(held_.get())) {}
  template <typename V>
  V* take(int64_t count) {
    V* piece = reinterpret_cast<V*>(next_);
    next_ = align(next_ + count * sizeof(V) + SLACK);
    return piece;
  }

 private:
  static char* align(char* p) { return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64); }
  std::unique_ptr<char[]> held_;
  char* next_;
};
