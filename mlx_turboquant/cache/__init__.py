"""Compressed caches of an attention layer: for one sequence, for a batch, for latent vectors."""
