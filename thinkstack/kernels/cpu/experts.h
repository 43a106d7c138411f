// The arguments of the kernel of routed experts.
#pragma once
#include <cstdint>

// N tokens, K choices per token, E experts, D hidden size, I intermediate size; D and I are multiples of 16.
struct Experts {
  const void* x;            // (N, D)
  const float* weights;     // (N, K)
  const int64_t* experts;   // (N, K)
  const void *w_in, *w_out; // (E, 2I, D): gate rows, then up rows; (E, D, I)
  void* out;                // (N, D)
  void* hidden;             // (blocks, 2I, BLOCK): gate and up of each block; null without gradients
  void* picked;             // (N * K, D): output of each pair
  const void* grad;         // (N, D)
  void *grad_x, *grad_pairs, *grad_w_in, *grad_w_out;  // (N, D), (N * K, D) scratch, as the weights
  float* grad_weights;      // (N, K)
  int64_t N, K, E, D, I, threads;
};

extern "C" void experts(const Experts* a, int64_t is_bf16, int64_t backward);
