"""Operations on tensors: with torch's operators, C++ on a CPU, or Triton on a GPU; ops.py decides."""
