"""The compressed caches of an attention layer: of one sequence, of several, of latent vectors."""
