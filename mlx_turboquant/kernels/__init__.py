"""Packed tokens, and the kernels that write and read them, on Metal, CUDA and in plain MLX."""
