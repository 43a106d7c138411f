"""Sizes that the implementations require or are made for."""

ROW_TILE = 16
"""Rows of a matmul with torch's operators are padded to a multiple of this, so that the fp32 result of a row does not
depend on the number of rows."""
LANES = 16
"""Number of elements that the sizes of experts, and of matrices in fp32, must be multiples of for the C++ kernels."""
SMALL_M = 8
"""Maximum number of rows for the small-M kernels, which are bound by the time to read the weights."""
SMALL_M_ALIGNMENT = 32
"""Number of elements that the inputs of matrices must be multiples of for the small-M kernels."""
EXPERT_BLOCK = 64
"""Number of (token, expert) pairs per block of the kernel of experts; equal to BLOCK in experts.cpp."""
MAX_TRITON_ROWS = 64
"""Maximum number of rows for the Triton kernel with 8-bit matrices, which is bound by the time to read the weights."""
MAX_PREPACKED_ROWS = 512
"""Maximum number of rows for prepacked bf16 matrices; with more rows the matmul takes much longer than the reorder."""
