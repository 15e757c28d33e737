"""Compressed caches for the models of mlx-lm: which bits, which layers, switched on and saved."""
