"""The codec, which packs vectors into words and restores them without a model or kernel."""
