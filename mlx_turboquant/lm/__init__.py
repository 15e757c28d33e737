"""Compressed caches for models of mlx-lm: choice of layers and bits, enabling, and files."""
