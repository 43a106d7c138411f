// Attention of new tokens over their sequences' cached contexts: what the kernel is given, and how heads get there.
#pragma once
#include "tiles.h"

// N tokens, G groups, Q query heads per group, W key width, V value width.
struct Decode {
  const void* query;      // (N, G, Q, W)
  const void* entries;    // of one layer, (blocks, 2^shift, entry width)
  const int32_t* tables;  // (sequences, table_width): the blocks of each, in order
  const int32_t* owner;   // (N,): the sequence of each token
  const int64_t* last;    // (N,): the last token of it that it sees; the first is 0
  void* out;              // (N, G, Q, V)
  int64_t N, G, Q, W, V, shift, table_width, entry_width;
  int64_t key_g, value_g, value_at;  // group g's key starts at g * key_g, its value at value_at + g * value_g
  int64_t longest, threads;
  double scale;  // of the scores
};

extern "C" void decode(const Decode* a, int64_t is_bf16);

template <typename From, typename To>
void copy_row(const From* from, To* to, int64_t width) {
  for (int64_t c = 0; c < width; c += LANES) store_some(to + c, load_some(from + c, width - c), width - c);
}

// A projected head of width W, normed where there is a weight and rotated, to where attention reads it. room: W floats,
// which may be the head itself.
template <typename From>
void place_head(const From* head, const float* weight, double eps, const float* rope, bool interleaved, bf16* to, int64_t W, float* room) {
  if (weight) {
    copy_row(head, to, W);
    norm_row(to, weight, to, W, eps);
    copy_row(to, room, W);
  } else {
    copy_row(head, room, W);
  }
  turn(room, rope, W, interleaved, 1);
  copy_row(room, to, W);
}
