"""CPU kernels in C++: what the model's hot operations do when a compiler is at hand. See models/kernels.py."""
